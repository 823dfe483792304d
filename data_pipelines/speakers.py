"""A distribution over languages from the numbers of their speakers.

    python -m data_pipelines.speakers --table=linguameta.tsv --languages=en,zh,sw,yo \\
        --alpha=0.5 --floor=0.02 --cap=0.4

prints a share for each language, which add up to 1: speakers ** alpha, within floor and cap.
Without --languages it takes all that the table has numbers for.

The table is LinguaMeta's (https://github.com/google-research/url-nlp, linguameta/linguameta.tsv,
CC BY-SA 4.0: name it where you publish what you made with it). Its numbers are rounded estimates.

Speakers are counted once: those of a language that is part of a macrolanguage (cmn of zh) are that
one's. Where both are named they are taken out of the macrolanguage's (zh and yue: zh without yue).
A few languages have more speakers in the table than their macrolanguage (id, ms): these were
counted apart, and stay so.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from absl import flags

from data_pipelines.shares import shares
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError


@dataclass(frozen=True)
class Language:
    """A row of the table."""

    code: str  # BCP-47
    name: str  # in English
    speakers: int  # 0: the table has no number
    part_of: str  # code of its macrolanguage, or ""


def read_table(path: str) -> dict[str, Language]:
    """``{code: Language}``. Raises InputError where the file is not LinguaMeta's table."""
    needed = ("bcp_47_code", "english_name", "estimated_number_of_speakers",
              "macrolanguage_bcp_47_code", "deprecated_bcp_47_code")  # fmt: skip
    found: dict[str, Language] = {}
    old: dict[str, Language] = {}  # names that a language had: iw of he
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise InputError(f"{path}: no column {missing[0]!r}; give LinguaMeta's linguameta.tsv")
        for row in rows:
            code, name, speakers, part_of, deprecated = (row[key] or "" for key in needed)
            if speakers and not speakers.isdecimal():
                raise InputError(f"{path}:{rows.line_num}: speakers of {code}: {speakers!r}")
            found[code] = Language(code, name, int(speakers or 0), part_of)
            if deprecated:
                old[deprecated] = found[code]
    return old | found


def speakers(table: Mapping[str, Language], languages: Sequence[str] = ()) -> dict[str, int]:
    """``{language: speakers}`` of these languages (BCP-47), or of all that have a number.

    A script or region is looked past: ``pt-BR`` has the speakers of pt. Raises InputError that
    names the languages which the table lacks or has no number for, and those counted twice.
    """
    if not languages:
        rows = {row.code: row for row in table.values() if row.speakers}
        return {
            code: row.speakers for code, row in sorted(rows.items()) if not _is_part(row, table)
        }
    rows = {tag: table.get(tag) or table.get(tag.partition("-")[0].lower()) for tag in languages}
    lacking = [tag for tag, row in rows.items() if row is None]
    uncounted = [tag for tag, row in rows.items() if row is not None and not row.speakers]
    if lacking or uncounted:
        parts = [f"no language {', '.join(lacking)}"] if lacking else []
        parts += [f"no number of speakers for {', '.join(uncounted)}"] if uncounted else []
        raise InputError(f"the table of speakers has {' and '.join(parts)}; leave them out")
    tags: dict[str, str] = {}
    for tag, row in rows.items():
        if row.code in tags:
            raise InputError(
                f"{tags[row.code]} and {tag} have the same speakers, those of {row.code} in the"
                " table; name one of them"
            )
        tags[row.code] = tag
    counts = {tag: row.speakers for tag, row in rows.items()}
    for row in rows.values():
        if row.part_of in tags and _is_part(row, table):
            counts[tags[row.part_of]] -= row.speakers
    for tag, count in counts.items():
        if count <= 0:
            parts = [t for t, row in rows.items() if row.part_of == rows[tag].code]
            raise InputError(
                f"{tag} has no speakers but those of {', '.join(parts)}; leave one out"
            )
    return counts


def _is_part(row: Language, table: Mapping[str, Language]) -> bool:
    """Whether the speakers of a language are among those of its macrolanguage."""
    whole = table.get(row.part_of) if row.part_of else None
    return whole is not None and whole.speakers >= row.speakers


def distribution(
    path: str,
    languages: Sequence[str] = (),
    *,
    alpha: float = 1.0,
    floor: float = 0.0,
    cap: float = 1.0,
) -> dict[str, float]:
    """``{language: share}``: speakers ** alpha (temperature 1 / alpha), within floor and cap.

    Raises InputError as ``speakers`` and ``shares`` do.
    """
    if not 0 <= alpha < float("inf"):
        raise InputError(f"alpha must be 0 or more, not {alpha:g}; 0 gives every language the same")
    counts = speakers(read_table(path), languages)
    weights = {language: count**alpha for language, count in counts.items()}
    return shares(weights, floors=dict.fromkeys(weights, floor), caps=dict.fromkeys(weights, cap))


def main(_: list[str]) -> None:
    args = flags.FLAGS
    table = read_table(args.table)
    result = distribution(
        args.table, args.languages, alpha=args.alpha, floor=args.floor, cap=args.cap
    )
    counts = speakers(table, args.languages)
    for language, share in sorted(result.items(), key=lambda item: -item[1]):
        row = table.get(language) or table[language.partition("-")[0].lower()]
        print(f"{language:10}{share:8.3%}{counts[language]:16,}  {row.name}")


if __name__ == "__main__":
    flags.DEFINE_string("table", None, "LinguaMeta's linguameta.tsv.", required=True)
    flags.DEFINE_list("languages", [], "BCP-47 codes; empty: all that have a number of speakers.")
    flags.DEFINE_float("alpha", 1.0, "Share ~ speakers ** alpha; below 1 lifts small languages.")
    flags.DEFINE_float("floor", 0.0, "The least share of a language.")
    flags.DEFINE_float("cap", 1.0, "The largest share of a language.")
    cli.run(main)
