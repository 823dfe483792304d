"""One mixed training set from files of conversations, by source, kind and language.

    python -m data_pipelines.mixture --spec=mixture.toml --out=cache/mixture

``mixture_spec.py`` says what a spec is. Of all mixtures that have the shares it asks for, the one
nearest to the data as it is is taken. Where there is too little data for a share, other values of
that table take its place; what was asked, what came out and every such case are printed and saved.

Writes mixture.jsonl, mixture.txt (what is printed) and mixture.json (the same as numbers). It is
one file, so a training config names one path with weight 1, and every count is a count of lines:
the nth copy of a conversation has ``#n`` after its id. The same spec and data give the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines.mixture_spec import AXES, Axis, Spec, near, read_spec
from data_pipelines.shares import Grouping, balance, shares
from data_pipelines.speakers import read_table, speakers
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, from_dict, read_jsonl, write_jsonl
from llmzoo_jax.errors import InputError

# --- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A conversation in a file."""

    path: str
    line: int  # from 1
    offset: int  # of the line, in bytes
    id: str  # unique among all entries
    cell: tuple[str, str, str]  # source, kind, language
    loss_characters: int  # of the messages that are trained

    @property
    def key(self) -> str:
        """What the order of the draw depends on, whatever other sources there are."""
        return f"{self.cell[0]}:{os.path.basename(self.path)}:{self.line}"


def read_entries(spec: Spec) -> list[Entry]:
    """All conversations of all files, in order. Raises ConversationError."""
    entries: list[Entry] = []
    ids: set[str] = set()
    for source, pattern in spec.files.items():
        for path in sorted(glob.glob(pattern)) or [pattern]:
            title = f"reading {os.path.basename(path)}"
            lines = _lines(path)
            for item in tqdm(
                read_jsonl(path), desc=title, unit=" conversations", delay=2, disable=None
            ):
                line, offset = next(lines)
                name = item.id or f"{source}:{line}"
                while name in ids or re.search(r"#\d+$", name):  # `#2` is for second copies
                    name += "+"
                ids.add(name)
                cell = (source, item.kind, item.lang)
                size = sum(len(m.content) for m in item.messages if m.trained)
                entries.append(Entry(path, line, offset, name, cell, size))
    return entries


def _lines(path: str) -> Iterator[tuple[int, int]]:
    """(line from 1, byte offset) of the lines that ``read_jsonl`` gives conversations of."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.decode("utf-8-sig").strip():
                yield number, offset
            offset += len(line)


# --- what is asked ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Of one value of an axis: what is asked, and how near to it the amount of data allows to be.

    All are shares of the total. ``low`` and ``high`` are equal where a share is asked for.
    """

    share: float | None  # None where the axis asks for no shares, but bounds them
    floor: float
    cap: float
    low: float
    high: float


def ask(
    name: str, axis: Axis, amounts: Mapping[str, int], *, total: int, epochs: int
) -> dict[str, Asked]:
    """What an axis asks for, value by value. ``amounts`` is the data of each value.

    Raises InputError where floors and caps contradict each other, and where the data, all of it
    ``epochs`` times, cannot give the total within the caps: it says how much it can.
    """
    for table in ("weights", "floors", "caps"):
        for value, number in getattr(axis, table).items():
            if value not in amounts and (table != "weights" or number):
                raise InputError(f"{name}.{table}.{value}: no conversation has it"
                                 + near(value, amounts))  # fmt: skip
    floors = {v: axis.floors.get(v, min(axis.floor, axis.caps.get(v, 1.0))) for v in amounts}
    caps = {v: axis.caps.get(v, max(axis.cap, floors[v])) for v in amounts}
    supply = {v: epochs * amount / total for v, amount in amounts.items()}
    within = {
        "floors": {v: min(floors[v], supply[v]) for v in amounts},
        "caps": {v: min(caps[v], supply[v]) for v in amounts},
    }
    try:
        sizes = speakers(read_table(axis.speakers), list(amounts)) if axis.speakers else amounts
        alpha = 1.0 if axis.alpha is None else axis.alpha
        weights = {v: axis.weights.get(v, 1.0) * float(sizes[v]) ** alpha for v in amounts}
        wanted = shares(weights, floors=floors, caps=caps)
        if sum(within["caps"].values()) < 1 - 1e-9:
            most = _most(caps, {v: epochs * amount for v, amount in amounts.items()})
            raise InputError(
                f"the data within the caps and {epochs} epochs is {most:,} of the {total:,} asked"
                " for; ask for less, raise epochs or the caps, or add data"
            )
        given = shares(weights, **within)
    except InputError as error:
        raise InputError(f"[{name}] {error}") from error
    return {
        v: Asked(wanted[v], floors[v], caps[v], given[v], given[v])
        if axis.exact
        else Asked(None, floors[v], caps[v], within["floors"][v], within["caps"][v])
        for v in amounts
    }


def _most(caps: Mapping[str, float], supply: Mapping[str, int]) -> int:
    """The largest total of which every value can have its part, within its cap and supply."""
    below, above = 0, sum(supply.values()) + 1
    while above - below > 1:
        middle = (below + above) // 2
        room = sum(min(caps[v] * middle, supply[v]) for v in caps)
        below, above = (middle, above) if room >= middle * (1 - 1e-9) else (below, middle)
    return below


# --- what is taken ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    copies: list[tuple[Entry, int]]  # in the order that is written; the number of the copy, from 1
    asked: dict[str, dict[str, Asked]]  # axis -> value
    settled: bool  # whether all axes have what they ask for at once


def mix(spec: Spec, entries: Sequence[Entry]) -> Mixture:
    """Which conversations come how often. Raises InputError as ``ask`` does."""
    axes = {name: getattr(spec, name) for name in AXES}
    cells: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        if all(axis.weights.get(v, 1) for axis, v in zip(axes.values(), entry.cell, strict=True)):
            cells.setdefault(entry.cell, []).append(entry)
    if not cells:
        raise InputError("no conversation is left: each has a weight of 0")
    names = sorted(cells)
    amounts = np.array([sum(_amount(spec, e) for e in cells[cell]) for cell in names], float)
    groupings, asked = [], {}
    for number, (name, axis) in enumerate(axes.items()):
        values, group = np.unique([cell[number] for cell in names], return_inverse=True)
        have = np.bincount(group, amounts).astype(int).tolist()
        have = dict(zip(values.tolist(), have, strict=True))
        asked[name] = ask(name, axis, have, total=spec.total, epochs=spec.epochs)
        bounds = np.array([(a.low, a.high) for a in asked[name].values()]) * spec.total
        groupings.append(Grouping(group, bounds[:, 0], bounds[:, 1]))
    every = np.arange(len(names))
    groupings.append(Grouping(every, np.zeros(len(names)), spec.epochs * amounts))
    wanted, settled = balance(amounts, groupings, total=float(spec.total))
    copies = _draw(dict(zip(names, wanted.tolist(), strict=True)), cells, spec)
    if not copies:
        raise InputError(f"loss_characters = {spec.total} is less than half of any conversation")
    return Mixture(copies, asked, settled)


def _amount(spec: Spec, entry: Entry) -> int:
    """What a conversation counts in the shares and the total."""
    return 1 if spec.conversations else entry.loss_characters


def _draw(
    wanted: Mapping[tuple[str, str, str], float],
    cells: Mapping[tuple[str, str, str], list[Entry]],
    spec: Spec,
) -> list[tuple[Entry, int]]:
    """Whole conversations, as near to the wanted amounts as they can be.

    A cell goes through its conversations in an order drawn anew for each pass. What one cell gets
    too much or too little of, the next makes up for.
    """

    def order(*parts: object) -> bytes:
        text = ":".join(map(str, (spec.seed, *parts)))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    full = {c: spec.epochs * sum(_amount(spec, e) for e in cells[c]) for c in cells}
    carry, copies = 0.0, []
    # Cells without room to spare come first, as they could not make up for others.
    for cell in sorted(cells, key=lambda c: (round(full[c] - wanted[c], 3), c)):
        target, taken, number = min(wanted[cell] + carry, full[cell]), 0, 0
        whole = True  # whether all of the pass before was taken
        while whole and taken < target and number < spec.epochs:
            number += 1
            ranked = sorted((order(number, entry.key), i) for i, entry in enumerate(cells[cell]))
            entries = [cells[cell][i] for _, i in ranked]
            sums = np.cumsum([taken] + [_amount(spec, entry) for entry in entries])
            count = int(np.searchsorted(sums, target, side="right")) - 1
            if count < len(entries) and sums[count + 1] - target < target - sums[count]:
                count += 1  # one more is nearer
            copies += [(entry, number) for entry in entries[:count]]
            taken, whole = int(sums[count]), count == len(entries)
        carry += wanted[cell] - taken
    return sorted(copies, key=lambda copy: (order("write", copy[0].key, copy[1]), copy[0].id))


# --- what came out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One value of an axis, asked and got."""

    value: str
    asked: float | None  # None: bounded at most
    floor: float
    cap: float
    got: float
    conversations: int  # written
    loss_characters: int  # written
    distinct: int  # conversations, copies not counted
    available: int  # conversations in the data
    times: int  # of the conversation that came most often
    note: str  # what could not be met, and why


def rows(spec: Spec, entries: Sequence[Entry], mixture: Mixture) -> dict[str, list[Row]]:
    """``{axis: a Row for each value in the data}``, the largest first."""
    result = {}
    total = sum(_amount(spec, entry) for entry, _ in mixture.copies)
    for number, name in enumerate(AXES):
        available = Counter(entry.cell[number] for entry in entries)
        counts = {value: Counter() for value in available}
        for entry, copy in mixture.copies:
            count = counts[entry.cell[number]]
            count["amount"] += _amount(spec, entry)
            count["conversations"] += 1
            count["loss_characters"] += entry.loss_characters
            count["distinct"] += copy == 1
            count["times"] = max(count["times"], copy)
        result[name] = []
        for value, count in sorted(counts.items(), key=lambda item: -item[1]["amount"]):
            got = count.pop("amount", 0) / total
            asked = mixture.asked[name].get(value, Asked(0.0, 0.0, 0.0, 0.0, 0.0))
            fields = {key: count[key] for key in ("conversations", "loss_characters", "distinct",
                                                  "times")}  # fmt: skip
            row = Row(value, asked.share, asked.floor, asked.cap, got, available=available[value],
                      note=_note(asked, got, len(mixture.copies)), **fields)  # fmt: skip
            result[name].append(row)
    return result


def _note(asked: Asked, got: float, conversations: int) -> str:
    """What could not be met, beyond what whole conversations explain; or nothing."""
    slack = 0.001 + 1.5 / conversations
    if got < asked.floor - slack:
        scarce = asked.low < asked.floor - slack
        reason = "for lack of data" if scarce else "beside the other shares"
        return f"the floor of {asked.floor:.1%} could not be met {reason}"
    if got > asked.cap + slack:
        return f"the cap of {asked.cap:.1%} could not be held beside the other shares"
    if asked.share is not None and asked.high < asked.share - slack:
        return "too little data for the share: all of it comes as often as epochs allows"
    if not asked.low - slack <= got <= asked.high + slack:
        return "not the share that was asked, because of the other tables"
    return ""


def describe(spec: Spec, mixture: Mixture, tables: Mapping[str, Sequence[Row]]) -> str:
    """What is printed: a table an axis, and the warnings."""
    size = sum(entry.loss_characters for entry, _ in mixture.copies)
    distinct = sum(copy == 1 for _, copy in mixture.copies)
    unit = "conversations" if spec.conversations else "loss characters"
    parts = [
        f"asked: {spec.total:,} {unit}, each conversation {spec.epochs} times at most, seed"
        f" {spec.seed}\ngot: {len(mixture.copies):,} conversations ({distinct:,} distinct),"
        f" {size:,} loss characters; shares are of {unit}"
    ]
    for name, axis_rows in tables.items():
        lines = [(name, "asked", "got", "conversations", "loss chars", "distinct", "of", "times")]
        for row in axis_rows:
            numbers = (row.conversations, row.loss_characters, row.distinct, row.available)
            lines.append((row.value, _asked(row), f"{row.got:.2%}", *(f"{n:,}" for n in numbers),
                          str(row.times)))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append("\n".join(
            "  ".join(cell.rjust(width) if i else cell.ljust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        ))  # fmt: skip
    parts += ["\n".join(f"warning: {text}" for text in warnings(mixture, tables))]
    return "\n\n".join(part for part in parts if part)


def _asked(row: Row) -> str:
    if row.asked is not None:
        return f"{row.asked:.2%}"
    bounds = [f">= {row.floor:.1%}"] if row.floor else []
    bounds += [f"<= {row.cap:.1%}"] if row.cap < 1 else []
    return " ".join(bounds) or "-"


def warnings(mixture: Mixture, tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """What was asked and could not be had; ``settled`` is said where no single value shows it."""
    found = [f"{name} {row.value}: {row.note} (asked {_asked(row)}, got {row.got:.2%})"
             for name, axis_rows in tables.items() for row in axis_rows if row.note]  # fmt: skip
    if not mixture.settled:
        found.insert(0, "no mixture of this data has all of these shares at once; this one is near")
    return found


# --- writing ------------------------------------------------------------------------------------


def read_copies(copies: Sequence[tuple[Entry, int]]) -> Iterator[Conversation]:
    """The conversations of the copies, from their files; the nth copy has ``#n`` after its id."""
    with contextlib.ExitStack() as stack:
        files = {
            path: stack.enter_context(open(path, "rb")) for path in {e.path for e, _ in copies}
        }
        for entry, copy in tqdm(copies, desc="writing", unit=" conversations", delay=2,
                                disable=None):  # fmt: skip
            files[entry.path].seek(entry.offset)
            record = json.loads(files[entry.path].readline().decode("utf-8-sig"))
            found = from_dict(record, where=f"{entry.path}:{entry.line}")
            name = entry.id if copy == 1 else f"{entry.id}#{copy}"
            yield dataclasses.replace(found, id=name)


def main(_: list[str]) -> None:
    spec, out = read_spec(flags.FLAGS.spec), Path(flags.FLAGS.out)
    entries = read_entries(spec)
    try:
        mixture = mix(spec, entries)
    except InputError as error:
        raise InputError(f"{flags.FLAGS.spec}: {error}") from error
    tables = rows(spec, entries, mixture)
    text = describe(spec, mixture, tables)
    result = {
        "spec": dataclasses.asdict(spec),
        "axes": {
            name: [dataclasses.asdict(row) for row in found] for name, found in tables.items()
        },
        "warnings": warnings(mixture, tables),
    }
    write_jsonl(out / "mixture.jsonl", read_copies(mixture.copies))
    _write(out / "mixture.txt", text + "\n")
    _write(out / "mixture.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(text)
    print(f"\nwritten to {out / 'mixture.jsonl'}; a training config names it with weight 1")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    flags.DEFINE_string("spec", None, "TOML file; data_pipelines/mixture_spec.py has its keys.",
                        required=True)  # fmt: skip
    flags.DEFINE_string("out", None, "Folder to write; safe to run again.", required=True)
    cli.run(main)
