"""Shows rows of packed training data as the model sees them.

    python -m data_pipelines.inspect --data=train.jsonl --tokenizer=DIR --length=512 --row=0
    python -m data_pipelines.inspect --data=train.jsonl --tokenizer=DIR --conversation=ID

Each segment of a row has a heading (which conversation, and where in the row), and its text, with
the position of the first token of a line in the margin. Tokens that are targets of the loss are
green and all others grey; without colour (a pipe, NO_COLOR, --color=never) ⟦ ⟧ enclose them.
Bytes that are tokens of their own are joined into whole characters.

With --conversation a single one is packed, into as many rows as it takes.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from llmzoo_jax import cli
from llmzoo_jax.chat_formats import ChatFormat
from llmzoo_jax.conversation import Conversation, read_jsonl
from llmzoo_jax.errors import InputError
from llmzoo_jax.packing import Batch, fill_rows, plan
from llmzoo_jax.tokenizer import Example, encode, load_tokenizer, resolve_format, show

TOKENS_A_LINE = 24


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a row: one conversation, or a piece of one that is longer than a row."""

    conversation: Conversation
    start: int  # first and last + 1 of its pairs in this row
    stop: int
    pairs: int  # of the whole conversation


@dataclass(frozen=True, eq=False)
class Row:
    number: int
    rows: int  # there are
    batch: Batch  # [1, T]
    segments: list[Segment]


def read(path: str, *, limit: int) -> list[Conversation]:
    """The first ``limit`` conversations of a file; all if it is 0."""
    return list(itertools.islice(read_jsonl(path), limit or None))


def find(path: str, name: str) -> Conversation:
    """The conversation with this id; or, if none has it, with this number in the file (from 1)."""
    ids, numbered = [], None
    for number, conversation in enumerate(read_jsonl(path), 1):
        if conversation.id == name:
            return conversation
        if str(number) == name:
            numbered = conversation
        ids.append(conversation.id)
    if numbered is not None:
        return numbered
    near = difflib.get_close_matches(name, [i for i in ids[:10_000] if i], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "the number of one in the file will do, too"
    raise InputError(f"{path}: no conversation {name!r} among {len(ids):,}; {hint}")


def pack(
    conversations: Sequence[Conversation],
    *,
    tokenizer: Any,
    chat_format: ChatFormat,
    length: int,
    where: str = "",
    number: int | None = None,
) -> Iterator[Row]:
    """Row ``number`` of the conversations packed together, or all rows.

    Raises ConversationError, beginning with ``where``, for one that cannot be encoded; InputError
    where there is no such row.
    """
    examples = []
    for index, item in enumerate(tqdm(conversations, desc="tokenising", delay=2, disable=None), 1):
        name = f"{where}: conversation {item.id or index}"
        examples.append(encode(item, tokenizer=tokenizer, chat_format=chat_format, where=name))
    lengths = [len(example.tokens) for example in examples]
    packed = plan(lengths, sequence_length=length, overlong="split")
    if number is not None and not 0 <= number < packed.rows:
        raise InputError(f"--row={number}: there are {packed.rows:,} rows, from 0 on")
    for row in range(packed.rows) if number is None else [number]:
        spans = packed.spans[packed.row_starts[row] : packed.row_starts[row + 1]].tolist()
        batch = fill_rows(packed, [row], lambda r: (examples[r].tokens, examples[r].loss_mask))
        segments = [Segment(conversations[r], a, b, lengths[r] - 1) for r, a, b in spans]
        yield Row(row, packed.rows, batch, segments)


def segment_tokens(row: Row, number: int) -> tuple[Example, np.ndarray, slice]:
    """Of segment ``number`` (from 1): its tokens with those that are trained, the position of each,
    and where it is in the row. All of it is read from the batch.

    One token more than the segment has pairs: the last one is a target only.
    """
    at = np.flatnonzero(row.batch.segment_ids[0] == number)
    tokens = np.append(row.batch.tokens[0, at], row.batch.targets[0, at[-1]])
    mask = np.insert(row.batch.loss_mask[0, at], 0, False)
    positions = np.append(row.batch.positions[0, at], row.batch.positions[0, at[-1]] + 1)
    return Example(tokens, mask), positions, slice(int(at[0]), int(at[-1]) + 1)


def lines(example: Example, positions: np.ndarray, tokenizer: Any) -> Iterator[tuple[int, Example]]:
    """(position, tokens) of about TOKENS_A_LINE tokens each, cut between whole characters."""
    start, count = 0, len(example.tokens)
    while start < count:
        stop = min(start + TOKENS_A_LINE, count)
        while stop < count and _ends_within_character(example.tokens[start:stop], tokenizer):
            stop += 1
        yield (
            int(positions[start]),
            Example(example.tokens[start:stop], example.loss_mask[start:stop]),
        )
        start = stop


def _ends_within_character(tokens: np.ndarray, tokenizer: Any) -> bool:
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    return text.endswith("\ufffd")


def print_row(row: Row, console: Console, *, tokenizer: Any, color: bool) -> None:
    """Writes a row: a heading, then the segments."""
    batch = row.batch
    used, length = int((batch.segment_ids > 0).sum()), batch.tokens.shape[1]
    console.rule(f"row {row.number} of {row.rows:,}")
    console.print(
        f"{length:,} positions: {used:,} in {len(row.segments):,} segments,"
        f" {int(batch.loss_mask.sum()):,} with a trained target, {length - used:,} padding",
        highlight=False,
    )
    for number, segment in enumerate(row.segments, 1):
        example, positions, where = segment_tokens(row, number)
        c = segment.conversation
        about = " · ".join(x for x in (c.id or "(no id)", c.lang, c.kind, c.source) if x)
        size = f"{segment.stop - segment.start:,} pairs, {int(example.loss_mask.sum()):,} trained"
        if segment.stop - segment.start < segment.pairs:
            size += f", pairs {segment.start:,}-{segment.stop - 1:,} of {segment.pairs:,}"
        console.print()
        console.print(Text(f"segment {number}  {about}", style="bold" if color else ""))
        console.print(
            f"row {where.start}-{where.stop - 1}, positions {positions[0]}-{positions[-2]}; {size}",
            highlight=False,
        )
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="cyan" if color else "", no_wrap=True)
        grid.add_column(overflow="fold")
        for position, line in lines(example, positions, tokenizer):
            text = show(line, tokenizer=tokenizer, color=color)
            grid.add_row(str(position), Text.from_ansi(text) if color else Text(text))
        console.print(grid)
    console.print()


def main(_: list[str]) -> None:
    args = flags.FLAGS
    console = Console(force_terminal={"always": True, "never": False}.get(args.color))
    color = console.color_system is not None and not console.no_color
    tokenizer = load_tokenizer(args.tokenizer)
    options = {
        "tokenizer": tokenizer,
        "chat_format": resolve_format(args.format, tokenizer),
        "length": args.length,
        "where": args.data,
    }
    if args.conversation:
        found = pack([find(args.data, args.conversation)], **options)
    else:
        conversations = read(args.data, limit=args.limit)
        found = pack(conversations, number=args.row, **options)
        console.print(f"{args.data}: {len(conversations):,} conversations, packed together")
    trained = "[green]green[/]" if color else "in ⟦ ⟧"
    console.print(f"targets of the loss are {trained}; in the margin: positions", highlight=False)
    for row in found:
        print_row(row, console, tokenizer=tokenizer, color=color)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "JSON Lines file of conversations.", required=True)
    flags.DEFINE_string("tokenizer", None, "Folder, or a tokenizer.model.", required=True)
    flags.DEFINE_string("format", "phoenix", "Chat format.")
    flags.DEFINE_integer("length", 512, "Positions in a row.", lower_bound=1)
    flags.DEFINE_integer("row", 0, "Which row, from 0.")
    flags.DEFINE_string("conversation", "", "Show this one (its id or number), not a row of all.")
    flags.DEFINE_integer("limit", 1000, "Conversations to read and pack; 0: the whole file.",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "Colours.")
    cli.run(main)
