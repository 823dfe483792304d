"""User-centered instructions: role set -> seed triplets -> new triplets -> answers.

A triplet is (role, instruction, input). Each round shows the model triplets of the pool, which
begins with seeds.toml, and asks for new ones for roles of roles.toml, in a sampled language; what
is well formed and no near copy of another joins the pool and is answered. LLM Zoo's algorithm 2.
"""

from __future__ import annotations

import json
import random
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.generation import (
    Estimate,
    Job,
    Options,
    Record,
    chat_messages,
    one_request,
    question,
    sample_language,
)
from data_pipelines.generation.checks import check_echo, parse_json, plain
from data_pipelines.generation.languages import NAMES, check_language
from data_pipelines.sources import Dropped, Unusable
from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError

KIND = "user_centered_instruction"
HERE = Path(__file__).parent
A_REQUEST = 4  # new triplets that a request asks for
EXAMPLES = 3  # triplets of the pool that it shows
MORE = """\
You invent tasks that people bring to an assistant. A task has three parts:
- "role": one sentence to the assistant: who it should be ("You are ..."), or who asks \
("I am ..."). It may be "" where the task needs none.
- "instruction": what is to be done, such that the result can be judged.
- "input": the text, the data or the facts to work on, made up in full; "" where there are none.
Write every part in {language}. The tasks shall differ from the examples and from each other in \
subject, form and length, and be such as the people named below really have.
Reply with a JSON list of {number} objects with these three keys, and nothing else.\
"""
ANSWER = """\
Take the role that the user gives you, if any, or answer the person that the user says they are. \
Do the whole task, correctly and in {language}, unless it asks for another language.\
"""


@dataclass(frozen=True)
class Role:
    name: str
    side: str  # "executor": the assistant is it; "submitter": the user is


@dataclass(frozen=True)
class Triplet:
    role: str
    instruction: str
    input: str


@dataclass(frozen=True)
class Draft:
    """A triplet that is to be answered, and where it comes from."""

    name: str  # round.request.triplet
    triplet: Triplet
    lang: str


def load_roles() -> list[Role]:
    table = tomllib.loads((HERE / "roles.toml").read_text(encoding="utf-8"))
    return [Role(name, side) for side in ("executor", "submitter") for name in table[side]]


def load_seeds() -> list[Triplet]:
    table = tomllib.loads((HERE / "seeds.toml").read_text(encoding="utf-8"))
    return [Triplet(**seed) for seed in table["seed"]]


def estimate(options: Options, records: Sequence[Record]) -> Estimate:
    need(options, records)
    longest = max(len(question(*asdict(seed).values()).encode()) for seed in load_seeds())
    more = one_request(options, MORE, " " * (EXAMPLES * longest + 500))
    answer = one_request(options, ANSWER, answers=1)
    total = Estimate()
    for number in range(options.count):
        total += answer
        total += more if number % A_REQUEST == 0 else Estimate()
    return total


def need(options: Options, records: Sequence[Record]) -> None:
    if records:
        raise InputError("--recipe=user_centered needs no --data: it invents the instructions")
    if not options.count:
        raise InputError("--recipe=user_centered: say how many conversations with --count=N")


async def run(job: Job, records: Sequence[Record]) -> None:
    need(job.options, records)
    roles, pool = load_roles(), load_seeds()
    near = NearCopies()
    for seed in pool:
        near.add(seed.instruction + " " + seed.input)
    accepted = idle = number = 0
    while accepted < job.options.count and idle < 3:
        missing = job.options.count - accepted
        # As many requests as the pool can feed with different examples.
        size = min(-(-missing // A_REQUEST), max(1, len(pool) // EXAMPLES))
        drafts = await invent(job, number, size, roles, pool)
        if drafts is None:  # the cap: a round that is not whole would make another pool
            break
        new = []
        for place, draft in drafts:
            text = draft.triplet.instruction + " " + draft.triplet.input
            if copy := near.find(text):
                job.dropped[place] = Dropped(draft.name, "near copy", f"{text:.60} | {copy:.60}")
            elif len(new) < missing:
                near.add(text)
                new.append((place, draft.name, draft))
        await job.each(new, lambda draft: answer(job, draft))
        pool += [draft.triplet for _, _, draft in new]
        accepted += len(new)
        idle = 0 if new else idle + 1
        number += 1
    if idle == 3:
        found = f"{accepted} of {job.options.count}; three rounds brought none"
        job.dropped[(number,)] = Dropped("user_centered", "too few new triplets", found)


async def invent(
    job: Job, number: int, size: int, roles: list[Role], pool: list[Triplet]
) -> list[tuple[tuple[int, ...], Draft]] | None:
    """New triplets of round ``number``, of ``size`` requests, each with its place in the output.

    None where the cap left a request unanswered.
    """
    found: list[tuple[tuple[int, ...], Draft]] = []
    unfinished = job.unfinished

    async def one(request: int) -> None:
        draw = random.Random(f"{job.options.seed}:{number}:{request}")
        lang = sample_language(job.options.languages, job.options.seed, number, request)
        people = draw.sample(roles, 4)
        examples = [asdict(triplet) for triplet in draw.sample(pool, EXAMPLES)]
        wanted = "\n".join(
            f"- {'You are' if role.side == 'executor' else 'I am'}: {role.name}" for role in people
        )
        shown = json.dumps(examples, ensure_ascii=False, indent=1)
        system = MORE.format(language=NAMES[lang], number=A_REQUEST)
        user = f"Examples of the form (write yours in {NAMES[lang]}):\n{shown}\n\nFor:\n{wanted}"
        triplets = await job.ask(
            chat_messages(system, user), lambda text: parse_json(text, list), seed=request
        )
        for index, value in enumerate(triplets[:A_REQUEST]):
            place, name = (number, request, index), f"user_centered:{number}.{request}.{index}"
            try:
                found.append((place, Draft(name, to_triplet(value, lang), lang)))
            except Unusable as error:
                job.dropped[place] = Dropped(name, error.reason, error.detail)

    names = (((number, i), f"user_centered:{number}.{i}", i) for i in range(size))
    await job.each(names, one)
    return sorted(found, key=lambda item: item[0]) if job.unfinished == unfinished else None


def to_triplet(value: Any, lang: str) -> Triplet:
    if not isinstance(value, dict):
        raise Unusable("malformed triplet", f"{value!r:.80}")
    parts = [value.get(key, "") for key in ("role", "instruction", "input")]
    if not all(isinstance(part, str) for part in parts) or not parts[1].strip():
        raise Unusable("malformed triplet", f"{value!r:.80}")
    triplet = Triplet(*(part.strip() for part in parts))
    check_language(f"{triplet.role} {triplet.instruction}", lang)
    return triplet


async def answer(job: Job, draft: Draft) -> Conversation:
    triplet, lang = draft.triplet, draft.lang
    asked = question(triplet.role, triplet.instruction, triplet.input)

    def check(text: str) -> str:
        check_echo(text, triplet.instruction, asked)
        check_language(text, lang)
        return text

    system = ANSWER.format(language=NAMES[lang])
    reply = await job.ask(chat_messages(system, asked), check)
    return job.conversation(draft.name, lang, (Message("user", asked), Message("assistant", reply)))


class NearCopies:
    """Texts, found again by near copies: Jaccard similarity of 4-character pieces of 0.6 or more.

    Only texts that share one of their 12 smallest piece hashes are compared; texts that alike miss
    each other about once in 60,000.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._by_hash: dict[int, list[int]] = {}

    @staticmethod
    def _pieces(text: str) -> set[int]:
        text = plain(text)
        return {zlib.crc32(text[i : i + 4].encode()) for i in range(max(1, len(text) - 3))}

    def find(self, text: str) -> str | None:
        pieces = self._pieces(text)
        near = {i for hash in sorted(pieces)[:12] for i in self._by_hash.get(hash, ())}
        for i in sorted(near):
            other = self._pieces(self._texts[i])
            if len(pieces & other) >= 0.6 * len(pieces | other):
                return self._texts[i]
        return None

    def add(self, text: str) -> None:
        for hash in sorted(self._pieces(text))[:12]:
            self._by_hash.setdefault(hash, []).append(len(self._texts))
        self._texts.append(text)
