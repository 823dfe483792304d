"""Chat: a simulated user and an assistant take turns.

The user is somebody of roles.toml, who wants what a record of --data asks for, or, without --data,
something of their own. One request writes the user's message, which sees the conversation from the
other side, and the next one the assistant's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.generation import (
    Estimate,
    Job,
    Options,
    Record,
    one_request,
    question,
    sample_language,
)
from data_pipelines.generation.checks import check_echo
from data_pipelines.generation.languages import NAMES, check_language
from data_pipelines.generation.user_centered import load_roles
from data_pipelines.sources import Unusable
from llmzoo_jax.conversation import Conversation, Message

KIND = "chat_instruction"
END = "[END]"
USER = """\
You act a person who writes to an assistant. You are: {role}.
{goal}
You write only this person's next message, in {language}, as people type: often short, sometimes \
vague, and never as an assistant. Your first message says what you want. Later ones react to what \
you were told: ask about a detail, object, give missing facts, or go on to the next step. Do not \
say who you are unless it matters. When you have what you need, write only {end}.\
"""
GOAL = "This is what you want, in your own words: {goal}"
NO_GOAL = "You want help with something real that such a person meets in a normal week."
BEGIN = "(You open the conversation. Write the first message.)"
ASSISTANT = """\
You are a helpful assistant in a conversation in {language}. Answer in {language}. Be correct and \
concrete, ask back when something is missing that you need, and say when you do not know.\
"""


@dataclass(frozen=True)
class Scene:
    number: int
    role: str
    goal: str
    lang: str


def scenes(options: Options, records: Sequence[Record]) -> list[Scene]:
    roles = load_roles()
    result = []
    for number in range(len(records) or options.count):
        digest = hashlib.sha256(f"{options.seed}:role:{number}".encode()).digest()
        role = roles[int.from_bytes(digest[:8], "big") % len(roles)].name
        goal = NO_GOAL
        if records:
            goal = GOAL.format(goal=question(records[number].instruction, records[number].input))
        lang = sample_language(options.languages, options.seed, "chat", number)
        result.append(Scene(number, role, goal, lang))
    return result


def estimate(options: Options, records: Sequence[Record]) -> Estimate:
    total = Estimate()
    for scene in scenes(options, records):
        for turn in range(options.turns):
            total += one_request(options, USER, scene.role, scene.goal, BEGIN, answers=2 * turn)
            total += one_request(options, ASSISTANT, answers=2 * turn + 1)
    return total


async def run(job: Job, records: Sequence[Record]) -> None:
    async def write(scene: Scene) -> Conversation:
        return job.conversation(f"chat:{scene.number}", scene.lang, await talk(job, scene))

    found = scenes(job.options, records)
    await job.each((((s.number,), f"chat:{s.number}", s) for s in found), write)


async def talk(job: Job, scene: Scene) -> list[Message]:
    """The turns of both; an answer is the last. Raises Unusable where any turn is of no use."""
    language = NAMES[scene.lang]
    as_user = USER.format(role=scene.role, goal=scene.goal, language=language, end=END)
    as_assistant = ASSISTANT.format(language=language)
    turns: list[Message] = []

    def check(text: str) -> str:
        # A message that ends the conversation as well is a message.
        text = text if text == END else text.replace(END, "").strip()
        if not text or (text == END and not turns):
            raise Unusable("empty", "the user says nothing")
        if text != END:
            check_echo(text, *(turn.content for turn in turns))
            check_language(text, scene.lang)
        return text

    for _ in range(job.options.turns):
        # To the one who acts the user, what the user said is the assistant's.
        other = {"user": "assistant", "assistant": "user"}
        seen = [{"role": other[turn.role], "content": turn.content} for turn in turns]
        head = [{"role": "system", "content": as_user}, {"role": "user", "content": BEGIN}]
        said = await job.ask([*head, *seen], check, seed=scene.number)
        if said == END:
            break
        turns.append(Message("user", said))
        seen = [{"role": turn.role, "content": turn.content} for turn in turns]
        head = [{"role": "system", "content": as_assistant}]
        turns.append(Message("assistant", await job.ask([*head, *seen], check, seed=scene.number)))
    return turns
