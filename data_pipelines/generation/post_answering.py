"""Post-answering: language-specific answers, as somebody who lives with the language gives them.

A record that is in one of the languages stays in it; others are translated into a sampled one.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.generation import Estimate, Job, Options, Record, one_request, sample_language
from data_pipelines.generation.post_translation import TRANSLATE, answer, translate
from llmzoo_jax.conversation import Conversation

KIND = "language_specific_instruction"
ANSWER = """\
You grew up with {language} and write for people who live their daily life in it. Answer in \
{language}, in the manner and the terms that they would expect from a well-informed friend.
Where the answer depends on the place, as with food, holidays, law, school, money, units, names, \
stories or manners, answer for where {language} is spoken, and say which place you mean if it \
matters. Do not answer as a translation of an English answer would.\
"""


def target(options: Options, record: Record) -> str:
    if record.lang in options.languages:
        return record.lang
    return sample_language(options.languages, options.seed, record.where)


def estimate(options: Options, records: Sequence[Record]) -> Estimate:
    total = Estimate()
    for record in records:
        if target(options, record) != record.lang:
            total += one_request(options, TRANSLATE, record.instruction, record.input, " " * 40)
            total += one_request(options, ANSWER, answers=1)
        else:
            total += one_request(options, ANSWER, record.instruction, record.input)
    return total


async def run(job: Job, records: Sequence[Record]) -> None:
    async def write(record: Record) -> Conversation:
        localised = await translate(job, record, target(job.options, record))
        return await answer(job, localised, ANSWER)

    places = (((number,), record.where, record) for number, record in enumerate(records))
    await job.each(places, write)
