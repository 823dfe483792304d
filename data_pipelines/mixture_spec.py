"""What is asked of a mixture: a TOML file. Paths in it are relative to where the command runs.

::

    conversations = 20000          # or: loss_characters = 5_000_000, and shares are of these
    epochs = 3                     # no conversation comes more often than this
    seed = 0

    [files]                        # source = path, or a pattern such as cache/real/glaive_*.jsonl
    sharegpt_zh = "cache/real/sharegpt_zh.train.jsonl"
    xpersona = "cache/real/xpersona.train.jsonl"

    [language]                     # and [source], [kind], with the same keys
    alpha = 0.3                    # share ~ weight * (amount of data) ** alpha
    weights = {zh = 2.0, und = 0}  # 1 where not named; 0 leaves these conversations out
    floor = 0.02                   # for each; floors = {sw = 0.05} for one
    cap = 0.4                      # for each; caps = {en = 0.2} for one
    speakers = "linguameta.tsv"    # of [language] alone: numbers of speakers for amounts of data

A table with alpha, weights or speakers asks for exact shares; one with floors and caps alone bounds
them; without a table the shares are as the rest makes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmzoo_jax.errors import InputError

AXES = ("source", "kind", "language")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is asked of the shares of one axis."""

    alpha: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0
    cap: float = 1.0
    floors: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    speakers: str = ""  # path of the table; of language alone

    @property
    def exact(self) -> bool:
        """Whether it asks for shares; else it bounds those that come."""
        return self.alpha is not None or bool(self.speakers) or any(self.weights.values())


@dataclass(frozen=True, kw_only=True)
class Spec:
    files: Mapping[str, str]  # source -> path or pattern
    conversations: int = 0
    loss_characters: int = 0
    epochs: int = 1
    seed: int = 0
    source: Axis = field(default_factory=Axis)
    kind: Axis = field(default_factory=Axis)
    language: Axis = field(default_factory=Axis)

    @property
    def total(self) -> int:
        return self.conversations or self.loss_characters


def read_spec(path: str) -> Spec:
    """Raises InputError that names the file and the key."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    axes = {name: _axis(tree.pop(name, {}), f"{path}: {name}") for name in AXES}
    if axes["source"].speakers or axes["kind"].speakers:
        raise InputError(f"{path}: speakers belongs to [language]")
    _check_keys(tree, [f.name for f in dataclasses.fields(Spec)], f"{path}: ")
    files = tree.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: [files] names no source; write NAME = 'FILE.jsonl' below it")
    for name, file in files.items():
        if not isinstance(file, str):
            raise InputError(f"{path}: files.{name} = {file!r} is not a path")
    for key in ("conversations", "loss_characters", "epochs", "seed"):
        value = tree.get(key, 1)
        if type(value) is not int or (value < 1 and key != "seed"):
            raise InputError(f"{path}: {key} = {value!r} is not a whole number above 0")
    if ("conversations" in tree) == ("loss_characters" in tree):
        raise InputError(f"{path}: give conversations or loss_characters, one of the two")
    return Spec(**tree, **axes)


def _axis(tree: Any, where: str) -> Axis:
    """An axis from its TOML table."""
    if not isinstance(tree, dict):
        raise InputError(f"{where} = {tree!r} is not a table; write [{where.split()[-1]}]")
    _check_keys(tree, [f.name for f in dataclasses.fields(Axis)], f"{where}.")
    for key, value in tree.items():
        if key == "speakers":
            if not isinstance(value, str):
                raise InputError(f"{where}.speakers = {value!r} is not a path")
        elif key in ("weights", "floors", "caps"):
            if not isinstance(value, dict):
                raise InputError(f"{where}.{key} = {value!r} is not a table {{NAME = NUMBER}}")
            for name, number in value.items():
                _check_number(number, f"{where}.{key}.{name}", share=key != "weights")
        else:
            _check_number(value, f"{where}.{key}", share=key != "alpha")
    return Axis(**tree)


def _check_number(value: Any, where: str, *, share: bool) -> None:
    usable = type(value) in (int, float) and 0 <= value < math.inf and (not share or value <= 1)
    if not usable:
        wanted = "a share from 0 to 1" if share else "a number of 0 or more"
        raise InputError(f"{where} = {value!r} is not {wanted}")


def _check_keys(tree: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for key in tree:
        if key not in names:
            raise InputError(f"{where}{key}: unknown key{near(key, names)}")


def near(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is not one of ``names``."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(names)}"
