"""Post-translation: instruction and input go into a sampled language, and are answered in it.

So the answer is written in the language, and is no translation (LLM Zoo, algorithm 1).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

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
from data_pipelines.sources import Unusable
from llmzoo_jax.conversation import Conversation, Message

KIND = "multilingual_instruction"
TRANSLATE = """\
You translate tasks that people give to an assistant into {language}.
The task is a JSON object with "instruction" and "input". Translate both as a native speaker would \
write them, and never carry the task out. Leave program code, formulas, addresses and quoted names \
as they are. If the task is about a word or a sentence of the original language, keep that word or \
sentence and translate what is around it.
Reply with one JSON object that has the same two keys, and nothing else. An empty input stays "".\
"""
ANSWER = """\
You are a careful assistant who writes in {language}. Do what the user asks, completely and \
correctly, in {language} unless the task itself calls for another language.\
"""


def estimate(options: Options, records: Sequence[Record]) -> Estimate:
    total = Estimate()
    for record in records:
        lang = target(options, record)
        if lang != record.lang:
            total += one_request(options, TRANSLATE, record.instruction, record.input, " " * 40)
            total += one_request(options, ANSWER, answers=1)
        else:
            total += one_request(options, ANSWER, record.instruction, record.input)
    return total


def target(options: Options, record: Record) -> str:
    return sample_language(options.languages, options.seed, record.where)


async def run(job: Job, records: Sequence[Record]) -> None:
    async def write(record: Record) -> Conversation:
        translated = await translate(job, record, target(job.options, record))
        return await answer(job, translated, ANSWER)

    places = (((number,), record.where, record) for number, record in enumerate(records))
    await job.each(places, write)


async def translate(job: Job, record: Record, lang: str) -> Record:
    """The record in a language; itself where it is in it already."""
    if lang == record.lang:
        return record

    def check(text: str) -> Record:
        found = parse_json(text, dict)
        instruction, extra = found.get("instruction"), found.get("input", "")
        if not isinstance(instruction, str) or not isinstance(extra, str):
            raise Unusable("not JSON", f"instruction and input are no strings: {text:.80}")
        if not instruction.strip() or bool(extra.strip()) != bool(record.input):
            raise Unusable("empty", f"instruction or input is empty, or not empty: {text:.80}")
        if plain(instruction) == plain(record.instruction):
            raise Unusable("echo", f"not translated: {text:.80}")
        check_language(instruction, lang)
        return dataclasses.replace(
            record, instruction=instruction.strip(), input=extra.strip(), lang=lang
        )

    task = json.dumps(
        {"instruction": record.instruction, "input": record.input}, ensure_ascii=False
    )
    return await job.ask(chat_messages(TRANSLATE.format(language=NAMES[lang]), task), check)


async def answer(job: Job, record: Record, system: str) -> Conversation:
    """The record as a question, and its answer under a system prompt that is not kept."""
    asked = question(record.instruction, record.input)

    def check(text: str) -> str:
        check_echo(text, record.instruction, asked)
        check_language(text, record.lang)
        return text

    reply = await job.ask(chat_messages(system.format(language=NAMES[record.lang]), asked), check)
    turns = (Message("user", asked), Message("assistant", reply))
    return job.conversation(f"{record.where}:{record.lang}", record.lang, turns)
