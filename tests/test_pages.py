"""Pages have the users that the pool says, and a prefix is found exactly where it was published."""

import random

import pytest

from serving.pages import PagePool

SIZE = 4


def fill(pool, tokens, salt=None):
    """As an engine does: finds what is there, takes the rest, publishes what is full."""
    pages = pool.find(tokens, salt)
    found = len(pages)
    pages += [pool.take() for _ in range(-(-len(tokens) // SIZE) - found)]
    for n in range(len(tokens) // SIZE):
        before = pages[n - 1] if n else None
        pool.publish(pages[n], before, tokens[n * SIZE : (n + 1) * SIZE], salt)
        pages[n].written = True
    return pages, found


def test_a_published_prefix_is_found_by_whole_pages():
    pool = PagePool(20, SIZE)
    first, _ = fill(pool, list(range(11)))
    again, found = fill(pool, list(range(11)))
    assert found == 2
    assert again[:2] == first[:2]
    assert again[2] is not first[2]
    assert fill(pool, [*range(4), 99, 5, 6, 7])[1] == 1
    assert fill(pool, list(range(1, 9)))[1] == 0
    assert fill(pool, list(range(8)), salt="another adapter")[1] == 0


def test_the_same_tokens_after_other_tokens_are_another_page():
    pool = PagePool(20, SIZE)
    fill(pool, [0] * 4 + [1] * 4)
    assert fill(pool, [2] * 4 + [1] * 4)[1] == 0


def test_the_end_of_a_request_is_found_by_those_who_go_on_from_it():
    pool, tokens = PagePool(8, SIZE), list(range(6))
    first, _ = fill(pool, tokens)
    assert pool.find_end(first, tokens, None) is None
    first[1].written = True
    assert pool.publish_all(first, tokens, None, 1, ended=True) == 2
    pool.release(first)
    again, found = fill(pool, tokens)
    assert (found, pool.find_end(again, tokens, None)) == (1, first[1])
    for other in (tokens[:5], [*tokens, 6], [*tokens[:5], 9]):
        assert pool.find_end(again, other, None) is None
    assert pool.find_end(again[:1], tokens[:4], None) is None  # full: found as such
    assert pool.find_end(again, tokens[:2], "another adapter") is None
    pool.release([*again, *fill(pool, [7] * 4)[0]])
    for _ in range(7):  # the full pages go first
        pool.take()
    assert pool.find_end(first, tokens, None) == first[1]
    pool.take()
    assert pool.find_end(first, tokens, None) is None


def test_ends_take_an_eighth_of_the_pages_at_most():
    pool = PagePool(16, SIZE)
    ends = [[token] * 3 for token in range(4)]
    for tokens in ends:
        pages = [pool.take()]
        pages[0].written = True
        pool.publish_all(pages, tokens, None, 0, ended=True)
        pool.release(pages)
    assert (pool.used, pool.cached) == (0, 2)
    assert [pool.find_end([], tokens, None) is not None for tokens in ends] == [0, 0, 1, 1]


def test_unused_pages_stay_until_they_are_needed_and_the_oldest_go_first():
    pool = PagePool(4, SIZE)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        pool.release(fill(pool, tokens)[0])
    assert (pool.used, pool.cached, pool.available) == (0, 4, 4)
    pool.take()
    assert len(pool.find(new, None)) == 2
    assert len(pool.find(old, None)) == 1  # its last page went first: it is of no use alone
    with pytest.raises(IndexError):
        pool.take()


def test_a_page_that_was_never_written_is_not_found_after_its_user_left():
    pool = PagePool(4, SIZE)
    page = pool.take()
    pool.publish(page, None, [1] * SIZE, None)
    shared = pool.find([1] * SIZE, None)
    assert shared == [page]
    pool.release([page])
    assert pool.find([1] * SIZE, None) == [page]  # somebody still has it, and will write it
    pool.release([page])
    pool.release([page])
    assert pool.find([1] * SIZE, None) == []
    assert pool.available == 4


@pytest.mark.parametrize("seed", range(30))
def test_nothing_leaks_and_nobody_writes_what_another_reads(seed):
    rng = random.Random(seed)
    pool = PagePool(30, SIZE)
    held = []  # (tokens, pages)
    for _ in range(400):
        if held and (rng.random() < 0.45 or pool.available < 8):
            pool.release(held.pop(rng.randrange(len(held)))[1])
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 25))]
            held.append((tokens, fill(pool, tokens)[0]))
        users = {}
        for tokens, pages in held:
            for n, page in enumerate(pages):
                assert page.number > 0
                start = tuple(tokens[: (n + 1) * SIZE])
                # One page, one content: all who have it agree on every token up to its end.
                assert users.setdefault(page.number, (page, start)) == (page, start)
        assert pool.used == len(users)
        assert pool.used + pool.available == pool.total
    for _, pages in held:
        pool.release(pages)
    assert (pool.used, pool.available) == (0, 30)
