"""Reviews: what judges said of several answers to one question, and how orders are read from it.

A line of JSON a review, with LLM Zoo's keys; the lists are in the order in which the judge saw the
answers, and an order has the rank of each (1 is best, equal ones share a rank, -1: not read)::

    {"review_id": 1, "reviewer_id": "gpt-3.5-turbo", "lang": "en", "question_id": 1,
     "category": "generic", "answer_ids": ["..."], "text": "... Assistant 1 > Assistant 2",
     "metadata": {"question": "...", "answers": ["..."], "model_ids": ["..."]}, "order": [1, 2]}

``eval.judge`` adds ``aspect``, ``models`` as they were named, and ``how`` the order was read. With
scores, ``score`` is in place of ``order``: a number for each answer, the higher the better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmzoo_jax.errors import InputError

UNREAD = -1


@dataclass(frozen=True, kw_only=True)
class Review:
    """``order`` and ``answers`` are as the judge saw them: position i is Assistant i + 1."""

    question_id: int | str
    models: tuple[str, ...]
    order: tuple[int, ...]  # ranks; UNREAD for all where none was read
    text: str = ""
    score: tuple[float, ...] = ()  # where the judge gave scores; ``order`` follows from them
    answers: tuple[str, ...] = ()
    question: str = ""
    lang: str = "und"
    category: str = ""
    aspect: str = ""
    judge: str = ""
    declared: tuple[str, ...] = ()  # the models in the order of the benchmark, the reference first
    where: str = ""  # file:line

    @property
    def read(self) -> bool:
        return UNREAD not in self.order

    @property
    def ranks(self) -> dict[str, int]:
        return dict(zip(self.models, self.order, strict=True))


# --- files --------------------------------------------------------------------------------------


def read_reviews(path: str) -> list[Review]:
    """Raises InputError, with file and line, for what is no review."""
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                found.append(from_record(json.loads(line), where))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{where}: not a review ({error!r:.200})") from error
    if not found:
        raise InputError(f"{path}: there is no review in it")
    return found


def from_record(record: dict[str, Any], where: str) -> Review:
    about = record["metadata"]
    models = tuple(about["model_ids"])
    key = "score" if "score" in record else "order"
    given = tuple(record[key])
    if len(given) != len(models) or len(models) < 2 or len(set(models)) < len(models):
        raise InputError(
            f"{where}: {key!r} is {list(given)} for the models {list(models)}; it needs a number"
            " for each of two or more different models"
        )
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in given):
        raise InputError(f"{where}: {key!r} is {list(given)}, not a list of numbers")
    if key == "order" and UNREAD not in given and tuple(given) != ranks_of([-x for x in given]):
        raise InputError(f"{where}: 'order' is {list(given)}, which are no ranks, as 1, 2, 2, 4")
    return Review(
        question_id=record["question_id"],
        models=models,
        order=given if key == "order" else order_of_scores(given),
        score=given if key == "score" else (),
        text=record.get("text", ""),
        answers=tuple(about.get("answers", ())),
        question=about.get("question", ""),
        lang=record.get("lang") or "und",
        category=record.get("category", ""),
        aspect=record.get("aspect", ""),
        judge=record.get("reviewer_id", ""),
        declared=tuple(record.get("models", models)),
        where=where,
    )


def order_of_scores(scores: Sequence[float]) -> tuple[int, ...]:
    return (UNREAD,) * len(scores) if UNREAD in scores else ranks_of(scores)


def ranks_of(values: Sequence[float]) -> tuple[int, ...]:
    """1 for the highest, and 1 more than there are higher ones for the others: 1, 2, 2, 4."""
    return tuple(1 + sum(other > value for other in values) for value in values)


def ranks_of_groups(groups: Iterable[Sequence[int]], n: int) -> tuple[int, ...]:
    """Ranks of the numbers 1 to n, given as groups of equal ones, the best group first."""
    ranks, place = [0] * n, 1
    for group in groups:
        for number in group:
            ranks[number - 1] = place
        place += len(group)
    return tuple(ranks)


# --- the released parser ------------------------------------------------------------------------


def read_released(text: str, n: int) -> tuple[int, ...]:
    """What LLM Zoo's own parser (``eval_gpt_review_all.py``) makes of a review; UNREAD for all n
    where it finds nothing. Its quirks are kept: a repeated assistant leaves a rank of 0."""
    text = text.replace(">=", ">").replace(">>", ">").strip()
    for match in re.finditer(r"Assistant \d(?: [>=] Assistant \d)+", text):
        if match[0].count("Assistant") == n:
            break
    else:
        return (UNREAD,) * n
    numbers = [int(digit) for digit in re.findall(r"\d", match[0])]
    if max(numbers) > n:
        return (UNREAD,) * n
    ranks, rank, equal = [0] * n, 1, 0
    ranks[numbers[0] - 1] = 1
    for sign, number in zip(re.findall("[>=]", match[0]), numbers[1:], strict=True):
        if sign == ">":
            rank, equal = rank + equal + 1, 0
        else:
            equal += 1
        ranks[number - 1] = rank
    return tuple(ranks)


# --- a better one -------------------------------------------------------------------------------

How = Literal["chain", "all equal", "left out", "comparison", "levels"]
STATED: tuple[How, ...] = ("chain", "all equal")  # said outright; the others are understood


@dataclass(frozen=True)
class Reading:
    order: tuple[int, ...]
    how: How


_WIDE = str.maketrans({"＞": ">", "＜": "<", "＝": "=", "≥": ">", "≤": "<", "⩾": ">", "⩽": "<",
                       "≻": ">", "≺": "<", "≈": "=", "∼": "=", "~": "=",
                       **dict.fromkeys("*`'\"[]()#“”‘’", " "), "_": " "})  # fmt: skip
_ONE = r"assistant\s*(\d+)"
_SIGN = r"((?:[<>=]\s*)+)"
_CHAIN = re.compile(rf"{_ONE}(?:\s*{_SIGN}(?:the \w+ of )?{_ONE})+")
_LINK = re.compile(rf"(?:{_SIGN}(?:the \w+ of )?)?{_ONE}")
_NUMBERS = {2: "both|two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight",
            9: "nine"}  # fmt: skip
_SAME = (
    r"(?:all |both |are |is |is an? |have |has |of )(?:\w+ ){0,3}?"
    r"(?:equal|equally|equivalent|equivalently|the same|tied|identical)\b"
)
_UNLIKE = re.compile(
    r"\b(?:more|better|best|less|least|worse|worst|most|superior|inferior|except|but|however|not"
    r"|slightly|outperforms?)\b"
)
_SELF = r"(?:(?!assistant)[^.])*?"  # no other one is meant between
_HIGHER = r"(?:more|better|superior|stronger|greater|higher|outperforms|clearer|deeper|broader)"
_LOWER = r"(?:less|worse|inferior|weaker|lower|fewer|poorer)"
_LEVELS = {
    word: level
    for level, words in enumerate(
        ("very high|excellent|outstanding", "high|very good|strong", "good|fairly high",
         "moderate|medium|fair|average|somewhat", "low|limited|weak|poor", "very low|very poor"))
    for word in words.split("|")
}  # fmt: skip


def read_better(text: str, n: int) -> Reading | None:
    """The order of assistants 1 to n that a review states, or None: it never guesses.

    Tried in turn: a chain as ``Assistant 2 > Assistant 1 = Assistant 3`` that names each once (in
    any spelling of the signs; where chains contradict each other, one that is the last line counts,
    else none); prose at the end that calls all of them equal; then what takes more understanding: a
    chain that leaves some out, who come last; "Assistant 2 is more ... than Assistant 1", of two;
    and levels ("coherence is high") that are given to each. ``how`` says which it was.
    """
    text = text.translate(_WIDE).casefold().strip()
    chains = [
        groups for match in _CHAIN.finditer(text) if (groups := _groups(match[0])) is not None
    ]
    whole = [ranks_of_groups(g, n) for g in chains if _names(g) == list(range(1, n + 1))]
    if whole:
        if len(set(whole)) > 1 and not _ends_in_chain(text):
            return None
        return Reading(whole[-1], "chain")
    if not chains and (order := _all_equal(text, n)):
        return Reading(order, "all equal")
    if chains:
        named = _names(chains[0])
        if len(chains) > 1 or len(set(named)) < len(named) or named[-1] > n:
            return None
        rest = sorted(set(range(1, n + 1)) - set(named))
        return Reading(ranks_of_groups([*chains[0], rest], n), "left out")
    if n == 2 and (order := _comparison(text)):
        return Reading(order, "comparison")
    if order := _levels(text, n):
        return Reading(order, "levels")
    return None


def _groups(chain: str) -> list[list[int]] | None:
    """Groups of equal ones, the best first; None where the signs point both ways."""
    groups: list[list[int]] = []
    directions = set()
    for sign, number in _LINK.findall(chain):
        if "<" in sign and ">" in sign:
            return None
        if not groups or set(sign) & set("<>"):
            directions |= set(sign) & set("<>")
            groups.append([int(number)])
        else:
            groups[-1].append(int(number))
    if len(directions) > 1:
        return None
    return groups[::-1] if directions == {"<"} else groups


def _names(groups: Iterable[Sequence[int]]) -> list[int]:
    return sorted(number for group in groups for number in group)


def _ends_in_chain(text: str) -> bool:
    line = text.rstrip(" .\n").rpartition("\n")[2]
    return any(match.end() == len(line) for match in _CHAIN.finditer(line))


def _sentences(text: str) -> list[str]:
    """Of the last paragraph that says anything."""
    return re.split(r"(?<=[.!?])\s+|\n", re.split(r"\n\s*\n", text)[-1])


def _all_equal(text: str, n: int) -> tuple[int, ...] | None:
    """Where the last paragraph says of all that they are the same, and from there on nothing of a
    difference."""
    everyone = rf"\b(?:all|both|{_NUMBERS.get(n, 'all')})\b|no (?:clear )?(?:differ|distinct)"
    sentences = _sentences(text)
    for i, sentence in enumerate(sentences):
        named = {int(number) for number in re.findall(_ONE, sentence)}
        everybody = (re.search(everyone, sentence) and not named) or len(named) == n
        if everybody and re.search(_SAME, sentence):
            rest = " ".join(sentences[i:]).replace("no clear", "")
            if not _UNLIKE.search(rest):
                return (1,) * n
    return None


def _comparison(text: str) -> tuple[int, ...] | None:
    """Of two, where all sentences that compare them agree."""
    winners = set()
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        match = re.search(
            rf"{_ONE}\b{_SELF}\b({_HIGHER}|{_LOWER})\b{_SELF}\bthan\b{_SELF}{_ONE}", sentence
        )
        if match and match[1] != match[3] and " not " not in sentence:
            higher = re.fullmatch(_HIGHER, match[2])
            winners.add(int(match[1] if higher else match[3]))
    if len(winners) != 1 or not winners <= {1, 2}:
        return None
    return (1, 2) if winners == {1} else (2, 1)


def _levels(text: str, n: int) -> tuple[int, ...] | None:
    """Where the part of each assistant ends with a level, as in "coherence is moderate"."""
    parts = re.split(r"(?m)^\s*assistant\s*(\d+)\s*:", text)
    said = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    if sorted(said) != list(range(1, n + 1)):
        return None
    words = "|".join(sorted(_LEVELS, key=len, reverse=True))
    levels = []
    for number in range(1, n + 1):
        first = said[number].strip().partition("\n")[0]
        found = re.findall(rf"\b(?:is|are|as) ({words})\b", first)
        if not found:
            return None
        levels.append(-_LEVELS[found[-1]])
    return ranks_of(levels)
