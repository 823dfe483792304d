"""Recipes that write conversations with a model: one file a recipe.

A recipe has ``KIND``, ``estimate(options, records) -> Estimate`` and ``run(job, records)``. In
``run`` it hands items to ``Job.each``; what it returns for an item is its conversation, and
``Unusable`` drops the item with a reason. Requests are a function of options and records alone
(never of time, or of which answer came first), so a run that is begun again finds its answers.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_pipelines.endpoint import CapReached, Endpoint, Request, in_order, prompt_bound
from data_pipelines.generation.checks import check_text, whole
from data_pipelines.sources import Dropped, Unusable, read_records, text_of
from llmzoo_jax.conversation import Conversation, ConversationError, Message, check_messages

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a recipe is asked for."""

    languages: dict[str, float]  # weights; they need not sum to 1
    count: int = 0  # how many conversations at most; 0: one for each record of --data
    turns: int = 3  # of the user, in a chat
    seed: int = 0
    max_tokens: int = 1024  # of an answer; twice as many where it was cut off
    temperature: float = 0.7
    tries: int = 3  # how many answers may be of no use before the item is dropped
    source: str = ""
    license: str = ""


@dataclass(frozen=True)
class Record:
    """A record of --data: something to be asked."""

    where: str  # file:number
    instruction: str
    input: str
    lang: str


@dataclass(frozen=True)
class Estimate:
    """What a recipe may need, if no answer has to be asked for twice."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass
class Job:
    """A run of a recipe: what it may ask, and what came of it, by place in the output."""

    endpoint: Endpoint
    options: Options
    kind: str
    concurrency: int
    progress: Callable[[], None] = lambda: None  # after each item
    conversations: dict[tuple[int, ...], Conversation] = field(default_factory=dict)
    dropped: dict[tuple[int, ...], Dropped] = field(default_factory=dict)
    rejected: collections.Counter[str] = field(
        default_factory=collections.Counter
    )  # and asked again
    unfinished: int = 0  # items that the cap left undone

    async def each(
        self,
        items: Iterable[tuple[tuple[int, ...], str, T]],  # place, id, item
        write: Callable[[T], Awaitable[Conversation | None]],
    ) -> None:
        """Writes a conversation of each item (None: nothing to keep), in places of the output."""

        async def one(item: tuple[tuple[int, ...], str, T]) -> None:
            place, name, value = item
            try:
                conversation = await write(value)
                if conversation is not None:
                    check_messages(conversation.messages)
                    self.conversations[place] = conversation
            except CapReached:
                self.unfinished += 1
            except Unusable as error:
                self.dropped[place] = Dropped(name, error.reason, error.detail)
            except ConversationError as error:
                self.dropped[place] = Dropped(name, "malformed", str(error))
            self.progress()

        await in_order(items, one, concurrency=self.concurrency)

    async def ask(
        self, messages: Sequence[dict[str, str]], check: Callable[[str], T], *, seed: int = 0
    ) -> T:
        """What ``check`` makes of the first answer that is whole and passes it.

        ``seed`` tells apart requests of the same messages. Raises Unusable with the last reason.
        """
        max_tokens = self.options.max_tokens
        for attempt in range(self.options.tries):
            request = Request(
                messages=tuple(messages),
                max_tokens=max_tokens,
                temperature=self.options.temperature,
                seed=(self.options.seed * 1_000_003 + seed * 101 + attempt) % 2**31,
            )
            answer = await self.endpoint.ask(request)
            try:
                return check(whole(answer))
            except Unusable as error:
                problem = error
            if attempt + 1 < self.options.tries:
                self.rejected[problem.reason] += 1
            if problem.reason == "cut off":
                max_tokens = 2 * self.options.max_tokens
        raise problem

    def conversation(self, id: str, lang: str, messages: Iterable[Message]) -> Conversation:
        options = self.options
        return Conversation(
            messages=tuple(messages), id=id, lang=lang, kind=self.kind, source=options.source,
            license=options.license,
        )  # fmt: skip


def read_instructions(path: str, lang: str) -> Iterator[Record | Dropped]:
    """Of Alpaca records (``instruction``, ``input``), or of the first question of conversations.

    ``lang`` is for records that have none.
    """
    for where, record in read_records(path):
        try:
            if isinstance(record, Unusable):
                raise record
            yield Record(
                where, *_instruction(record), str(record.get("lang") or lang).split("-")[0]
            )
        except Unusable as error:
            yield Dropped(where, error.reason, error.detail)


def _instruction(record: dict[str, Any]) -> tuple[str, str]:
    if isinstance(record.get("messages"), list):
        users = [m for m in record["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        if not users:
            raise Unusable("no text", "no turn of the user")
        instruction, extra = text_of(users[0], "content"), ""
    else:
        instruction = text_of(record, "instruction")
        extra = text_of(record, "input") if record.get("input") else ""
    if not instruction.strip():
        raise Unusable("no text", "the instruction is empty")
    check_text(instruction + extra)
    return instruction.strip(), extra.strip()


def sample_language(languages: dict[str, float], *name: object) -> str:
    """A language by its weight, and by a hash of the name: the same wherever it is drawn."""
    digest = hashlib.sha256(":".join(map(str, name)).encode()).digest()
    left = int.from_bytes(digest[:8], "big") / 2**64 * sum(languages.values())
    for lang, weight in languages.items():
        left -= weight
        if left < 0:
            return lang
    return lang


def chat_messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def question(*parts: str) -> str:
    """Role, instruction and input as the user's message, as in ``sources.alpaca``."""
    return "\n".join(part for part in parts if part)


def one_request(options: Options, *texts: str, answers: int = 0) -> Estimate:
    """A request of two messages with these texts, and of ``answers`` earlier ones in it.

    A token of an answer is taken for four bytes where it becomes part of a prompt.
    """
    prompt = prompt_bound([{"content": "".join(texts)}, {"content": ""}])
    prompt += answers * 4 * options.max_tokens
    return Estimate(1, prompt, options.max_tokens)
