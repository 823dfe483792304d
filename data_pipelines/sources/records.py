"""Files and hub datasets -> records: dicts, one at a time, whatever the container.

JSON lists and JSON Lines (told apart by their first character), .parquet, .csv and .tsv with a
header, and ``hub:NAME``, ``hub:NAME:CONFIG`` or ``hub:NAME@SPLIT`` for what
``datasets.load_dataset`` knows by NAME: a dataset of the hub, or a local folder of one.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from data_pipelines.sources import json_list
from llmzoo_jax.errors import InputError

HUB = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")
_INSTALL = "install it with: pip install 'llmzoo-jax[data]'"


class Unusable(InputError):
    """A record cannot be read: the reason is counted, the detail is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """``name:number`` and the record. Numbers are those of lines in JSON Lines, else of records,
    and begin with 1.

    Raises InputError where the file is not UTF-8, or broken so that no further record can be read.
    """
    ending = os.path.splitext(path)[1].lower()
    if path.startswith("hub:"):
        name, items = path.removeprefix("hub:"), enumerate(_hub(path), 1)
    else:
        name = os.path.basename(path)
        readers = {".parquet": _parquet, ".csv": _table, ".tsv": _table}
        items = enumerate(readers[ending](path), 1) if ending in readers else _json(path)
    with _utf8(path):
        for number, item in items:
            if not isinstance(item, dict | Unusable):
                item = Unusable("not an object", f"{item!r:.80}")
            yield f"{name}:{number}", item


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, without their ends. Raises InputError where it is not UTF-8."""
    with _utf8(path), open(path, encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


@contextlib.contextmanager
def _utf8(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x}; convert the file to UTF-8"
        ) from error


def _json(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()[:1]
        file.seek(0)
        if start == "[":
            yield from enumerate(json_list.values(file, name=path), 1)
        else:
            yield from ((n, _json_or_error(line)) for n, line in enumerate(file, 1) if line.strip())


def _json_or_error(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unusable("not JSON", str(error))


def _table(path: str) -> Iterator[dict[str, str] | Unusable]:
    csv.field_size_limit(2**31 - 1)  # a dialogue in a cell is longer than the 131,072 of the module
    dialect = "excel-tab" if path.lower().endswith(".tsv") else "excel"
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, dialect, strict=True)
        try:
            columns = next(rows, [])
            for row in rows:
                if len(row) == len(columns):
                    yield dict(zip(columns, row, strict=True))
                elif row:
                    detail = f"{len(row)}, where the header has {len(columns)}"
                    yield Unusable("wrong number of cells", detail)
        except csv.Error as error:
            raise InputError(f"{path}: line {rows.line_num}: {error}; mend the quotes") from error


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow; {_INSTALL}") from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise InputError(f"{path}: not Parquet, or broken: {error}") from error


def _hub(path: str) -> Iterator[dict[str, Any]]:
    match = HUB.fullmatch(path)
    if not match:
        raise InputError(f"{path}: write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG@SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path}: reading the hub needs datasets; {_INSTALL}") from error
    try:
        split = match["split"] or "train"
        yield from datasets.load_dataset(match["name"], match["config"], split=split,
                                         streaming=True)  # fmt: skip
    except (OSError, ValueError) as error:  # no such dataset, config or split; no network
        raise InputError(f"{path}: {error}") from error
