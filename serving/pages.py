"""Pages of the key/value cache: who has them, and which begin like a new prompt. No JAX.

A page that is full, and whose tokens before it are known, is published under (the page before it,
its tokens), so a new request finds the longest beginning that any request had. Pages that nobody
uses any more stay published until they are needed, those unused for longest go first.

The last page of a request that is done is published, too, though it is not full: who goes on from
there copies it. Such ends are few: the newest, in an eighth of all pages.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

_serials = itertools.count()


@dataclass(eq=False, slots=True)
class Page:
    """``number`` is its place in the cache. ``written``: its keys and values are there, or will be
    before anything that is computed later. ``drafted``: of how many of its tokens a draft model has
    them, too (``speculation``)."""

    number: int
    users: int = 1
    written: bool = False
    drafted: int = 0
    key: tuple[Hashable, tuple[int, ...]] | None = None  # where it is published
    serial: int = field(default_factory=lambda: next(_serials))  # never used again, as numbers are


class PagePool:
    """Pages 1 to ``total``; page 0 is nobody's."""

    def __init__(self, total: int, size: int):
        self.total, self.size = total, size
        self._free = list(range(total, 0, -1))
        self._published: dict[Hashable, Page] = {}
        self._unused: OrderedDict[Page, None] = OrderedDict()  # published, full, without users
        self._ends: OrderedDict[Page, None] = OrderedDict()  # published, not full, without users

    @property
    def available(self) -> int:
        return len(self._free) + self.cached

    @property
    def cached(self) -> int:
        return len(self._unused) + len(self._ends)

    @property
    def used(self) -> int:
        return self.total - self.available

    def take(self) -> Page:
        """A page of one's own. Raises IndexError where none is ``available``."""
        if self._free:
            return Page(self._free.pop())
        if not self.cached:
            raise IndexError("no page is free")
        self._free_oldest(self._unused or self._ends)
        return Page(self._free.pop())

    def _free_oldest(self, pages: OrderedDict[Page, None]) -> None:
        page, _ = pages.popitem(last=False)
        del self._published[page.key]
        self._free.append(page.number)

    def find(self, tokens: Sequence[int], salt: Hashable) -> list[Page]:
        """The published pages with which ``tokens`` begin, now used once more. ``salt`` tells apart
        what makes other keys and values of the same tokens: an adapter."""
        pages: list[Page] = []
        before: Hashable = salt
        for start in range(0, len(tokens) - self.size + 1, self.size):
            page = self._published.get((before, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            if page.users == 0:
                del self._unused[page]
            page.users += 1
            pages.append(page)
            before = page.serial
        return pages

    def find_end(self, pages: Sequence[Page], tokens: Sequence[int], salt: Hashable) -> Page | None:
        """A page that has what the last of ``pages``, which is not full, is to have of ``tokens``,
        and after the same pages. It is not used, so it must be copied before a page is taken."""
        n = len(tokens) // self.size
        rest = tuple(tokens[n * self.size :])
        page = self._published.get((pages[n - 1].serial if n else salt, rest)) if rest else None
        return page if page is not None and page.written else None

    def publish(self, page: Page, before: Page | None, tokens: Sequence[int], salt: Hashable):
        """Lets others find a page; nothing where they find another one already."""
        key = (salt if before is None else before.serial, tuple(tokens))
        if page.key is None and key not in self._published:
            page.key = key
            self._published[key] = page

    def publish_all(
        self,
        pages: Sequence[Page],
        tokens: Sequence[int],
        salt: Hashable,
        start: int,
        *,
        ended: bool,
    ) -> int:
        """Publishes the pages of a row from number ``start`` on that ``tokens`` fill; the last one,
        too, if the row has ``ended``. Returns where to go on."""
        for n in range(start, -(-len(tokens) // self.size)):
            part = tokens[n * self.size : (n + 1) * self.size]
            before = pages[n - 1] if n else None
            # Where ``before`` has no key, another row's page is published in its place.
            if (len(part) < self.size and not ended) or (before is not None and before.key is None):
                return n
            self.publish(pages[n], before, part, salt)
        return max(start, -(-len(tokens) // self.size))

    def release(self, pages: Sequence[Page]) -> None:
        """Gives pages of one row back: the last ones first, since they are of no use without those
        before them. One that was never written can't be found any more."""
        for page in reversed(pages):
            page.users -= 1
            if page.users > 0:
                continue
            if page.key is not None and page.written:
                full = len(page.key[1]) == self.size
                (self._unused if full else self._ends)[page] = None
                if len(self._ends) > self.total // 8:
                    self._free_oldest(self._ends)
            else:
                if page.key is not None:
                    del self._published[page.key]
                self._free.append(page.number)

    def forget(self) -> None:
        """Nothing is published any more: the contents are lost."""
        for page in list(self._published.values()):
            page.key = None
        self._free.extend(page.number for page in (*self._unused, *self._ends))
        self._unused.clear()
        self._ends.clear()
        self._published.clear()
