"""Guesses of the tokens that rows get next, which one step of the model verifies: from what was
said before, or by a draft, a small model with the same tokens.

A draft has keys and values of its own for the pages that its rows have, under the same numbers.
They lag behind where a page was found, or filled, or decoded without it, and are made up for before
it guesses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving.rows import Row
from serving.runner import EngineOptions, Runner

Guesses = list[list[int]]  # of each row; none where nothing is guessed


def look_up(rows: Sequence[Row], count: int) -> Guesses | None:
    """Guesses from the rows' own tokens; None where fewer than half of the rows have any."""
    guesses = [find(row.tokens, count)[: row.left - 1] if row.free else [] for row in rows]
    return guesses if 2 * sum(map(bool, guesses)) >= len(rows) else None


def find(tokens: Sequence[int], count: int) -> list[int]:
    """``count`` tokens at most that may come next: those after the newest earlier place with the
    same last tokens (prompt look-up decoding; Saxena, 2023)."""
    for n in (3, 2):
        end = tokens[-n:]
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at : at + n] == end:
                return tokens[at + n : at + n + count]
    return []


class Draft:
    """``model`` guesses for ``target`` (speculative decoding; Leviathan et al., 2023, but with the
    keys of positions: what the draft draws is what the target would, where they agree).

    Raises InputError where the two don't go together.
    """

    def __init__(self, model: Model, target: Model, options: EngineOptions):
        o = options
        if not o.speculate:
            raise InputError("speculate=0: a draft model has nothing to guess; set --speculate=4")
        if model.config.vocab_size != target.config.vocab_size:
            raise InputError(
                f"draft_model={model.path} has {model.config.vocab_size:,} tokens, and "
                f"{target.path} {target.config.vocab_size:,}; a draft must have the same ones"
            )
        if model.tokenizer is not None and target.tokenizer is not None:
            ours, theirs = (one.tokenizer.get_vocab() for one in (model, target))
            if other := sorted(token for token, _ in ours.items() ^ theirs.items()):
                raise InputError(
                    f"draft_model={model.path} has other tokens than {target.path}: {other[0]!r}"
                )
        if model.context is not None and o.context > model.context:
            raise InputError(
                f"draft_model={model.path} has {model.context} positions, and context={o.context}"
            )
        self.options = dataclasses.replace(
            o,
            max_batch=min(o.max_batch, o.speculate_rows),
            cache_tokens=o.num_pages * o.page_size,
            window=o.speculate + 1,
            speculate=0,
            max_adapters=0,
        )
        self._runner = Runner(model, self.options, scores=False)
        self.warm_up, self.reset = self._runner.warm_up, self._runner.reset

    def guess(self, rows: Sequence[Row], count: int) -> Guesses | None:
        """Guesses for the rows, which have pages for ``count + 1`` tokens more. None where fewer
        than half of them have any. One call makes up for what lags, so that nobody waits long."""
        able = [row for row in rows if row.free and row.started and row.left > 1]
        if 2 * len(able) < len(rows):
            return None
        todo: list[tuple[Row, int]] = []
        for row in able:
            for n, drafted in self._lagging(row):
                if self._runner.fits([*todo, (row, n)], scored=False):
                    row.pages[n].drafted = drafted  # so a page of two rows is filled once
                    todo.append((row, n))
        if todo:
            self._runner.fill(todo, scored=False)
        able = [row for row in able if not any(self._lagging(row))]
        if 2 * len(able) < len(rows):
            return None
        # A step more than there are guesses, which writes the last one's keys and values.
        tokens = self._runner.decode(able, count + 1).tokens[:count]
        guesses = {
            row: [token for token in column if token >= 0][: row.left - 1]
            for row, column in zip(able, tokens.T.tolist(), strict=False)
        }
        return [guesses.get(row, []) for row in rows]

    def follow(self, rows: Sequence[Row], guesses: Guesses) -> None:
        """``rows`` took what was verified: guesses that were right, and the token after them. So
        the draft has all but their last token."""
        for row, guess in zip(rows, guesses, strict=True):
            if guess:
                for n, drafted in self._lagging(row):
                    row.pages[n].drafted = drafted

    def _lagging(self, row: Row) -> Iterator[tuple[int, int]]:
        """Pages, and how many tokens each should have, where the draft has fewer."""
        size, end = self.options.page_size, len(row.tokens) - 1
        for n, page in enumerate(row.pages[: -(-end // size)]):
            if page.drafted < (whole := min(size, end - n * size)):
                yield n, whole
