"""What is built from: recipes of raw sources, and what is true of all records of a source.

A dataset of one's own is a Python file with a ``RECIPE``, given as ``--recipe=my_dataset.py``::

    RECIPE = (RawSource("mine", conversations, "mine/*.jsonl", {"lang": "de", "kind": ..., ...}),)
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipelines.sources import (
    Item,
    alpaca,
    messages,
    mgsm,
    multilingual_sift,
    questions,
    seeds,
    sharegpt,
    tatoeba,
    xpersona,
    zh_or_en,
)
from llmzoo_jax.errors import InputError


@dataclass(frozen=True)
class RawSource:
    """A row of a recipe: files of one format, and what is true of all their records."""

    name: str  # of the files that are written
    read: Callable[..., Iterator[Item]]  # conversations() of a module in sources
    files: str  # pattern below --shared; or hub:NAME, see sources/records.py
    about: dict[str, object]  # lang (where the format does not know it), kind, source, license


def _row(name, read, files, *, source, license, kind, **about) -> RawSource:
    return RawSource(name, read, files, dict(source=source, license=license, kind=kind, **about))


_FACTORY = "github.com/hiyouga/LLaMA-Factory@ff6d4d1"
_FASTCHAT = "github.com/lm-sys/FastChat@0e6d3e4"
_LLMZOO = {"source": "github.com/FreedomIntelligence/LLMZoo@cf70d9c", "license": "CC BY-NC 4.0"}
_URL_NLP = "github.com/google-research/url-nlp@452a21a"
_ALPACA = "Apache-2.0 (upstream: alpaca-gpt4 CC BY-NC 4.0)"

# The licences are those of SOURCE.txt in each folder.
_REAL = (
    _row(
        "sharegpt_zh",
        sharegpt.conversations,
        "sharegpt-zh-1k/data/sft/sharegpt_zh_1K_format.jsonl",
        lang="zh",
        kind="conversation",
        source="github.com/shibing624/MedicalGPT@2f1008c",
        license="Apache-2.0 (upstream: user-shared ShareGPT conversations)",
    ),
    _row(
        "alpaca_en",
        alpaca.conversations,
        "llama-factory/data/alpaca_en_demo.json",
        lang="en",
        kind="language_specific_instruction",
        source=_FACTORY,
        license=_ALPACA,
    ),
    _row(
        "alpaca_zh",
        alpaca.conversations,
        "llama-factory/data/alpaca_zh_demo.json",
        lang="zh",
        kind="language_specific_instruction",
        source=_FACTORY,
        license=_ALPACA,
    ),
    _row(
        "identity",
        alpaca.conversations,
        "llama-factory/data/identity.json",
        lang=zh_or_en,
        kind="language_specific_instruction",
        source=_FACTORY,
        license="Apache-2.0",
    ),
    _row(
        "v1_sft",
        messages.conversations,
        "llama-factory/data/v1_sft_demo.jsonl",
        lang=zh_or_en,
        kind="language_specific_instruction",
        source=_FACTORY,
        license="Apache-2.0",
    ),
    _row(
        "glaive_en",
        sharegpt.conversations,
        "llama-factory/data/glaive_toolcall_en_demo.json",
        lang="en",
        kind="conversation",
        source=_FACTORY,
        license="Apache-2.0 (upstream: glaive)",
    ),
    _row(
        "glaive_zh",
        sharegpt.conversations,
        "llama-factory/data/glaive_toolcall_zh_demo.json",
        lang="zh",
        kind="conversation",
        source=_FACTORY,
        license="Apache-2.0 (upstream: glaive)",
    ),
    _row(
        "dpo_zh",
        sharegpt.conversations,
        "llama-factory/data/dpo_zh_demo.json",
        lang="zh",
        kind="conversation",
        source=_FACTORY,
        license="Apache-2.0 (upstream: DPO mix)",
    ),
    _row(
        "xpersona",
        xpersona.conversations,
        "xpersona/dataset/*_persona_*.json",
        kind="conversation",
        source="github.com/HLTCHKUST/Xpersona@1da049a",
        license="MIT",
    ),
    _row(
        "fastchat_dummy",
        sharegpt.conversations,
        "fastchat/data/dummy_conversation.json",
        lang="en",
        kind="conversation",
        source="github.com/lm-sys/FastChat@0e6d3e4",
        license="Apache-2.0",
    ),
)

_JUDGE = "fastchat/fastchat/llm_judge/data"
_EVERYTHING = (
    *_REAL,
    _row(
        "seeds_en",
        seeds.conversations,
        "seeds-en/seed_tasks.jsonl",
        lang="en",
        kind="language_specific_instruction",
        source="github.com/tatsu-lab/stanford_alpaca@761dc5b",
        license="CC BY-NC 4.0",
    ),
    _row(
        "seeds_zh",
        seeds.conversations,
        "seeds-zh/data/1.5M/zh_seed_tasks.json",
        lang="zh",
        kind="language_specific_instruction",
        source="github.com/LianjiaTech/BELLE@645084d",
        license="ODC-By 1.0",
    ),
    _row(
        "seeds_fr",
        seeds.conversations,
        "seeds-fr/data/instruct/seed_tasks_vigogne.jsonl",
        lang="fr",
        kind="multilingual_instruction",
        source="github.com/bofenghuang/vigogne@67ea8a2",
        license="CC BY-NC 4.0",
    ),
    _row(
        "seeds_ru",
        seeds.conversations,
        "seeds-ru/self_instruct/data/ru_alpaca_seed_tasks.jsonl",
        lang="ru",
        kind="multilingual_instruction",
        source="github.com/IlyaGusev/rulm@7dea0d0",
        license="Apache-2.0",
    ),
    _row(
        "tatoeba",
        tatoeba.conversations,
        "tatoeba/data/tatoeba/v1/tatoeba.*-eng.eng",
        kind="multilingual_instruction",
        source="github.com/facebookresearch/LASER@74bc6ae",
        license="CC BY 2.0 FR",
    ),
    _row(
        "llmzoo_140",
        questions.conversations,
        "llmzoo/llmzoo/eval/questions/*.jsonl",
        benchmark="llmzoo-70",
        parallel=70,
        kind="multilingual_instruction",
        **_LLMZOO,
    ),
    _row(
        "llmzoo_100",
        questions.conversations,
        "llmzoo/llmzoo/eval/questions/multilingual/*100.jsonl",
        benchmark="llmzoo-100",
        kind="multilingual_instruction",
        **_LLMZOO,
    ),
    _row(
        "vicuna_80",
        questions.conversations,
        f"{_JUDGE}/vicuna_bench/question.jsonl",
        benchmark="vicuna-80",
        lang="en",
        kind="language_specific_instruction",
        source=_FASTCHAT,
        license="Apache-2.0",
    ),
    _row(
        "mt_bench",
        questions.conversations,
        f"{_JUDGE}/mt_bench/question.jsonl",
        benchmark="mt-bench",
        lang="en",
        kind="conversation",
        source=_FASTCHAT,
        license="Apache-2.0",
    ),
    _row(
        "multilingual_sift",
        multilingual_sift.conversations,
        "multilingual-sift/eval/vicuna_eval/questions/questions_*.jsonl",
        kind="multilingual_instruction",
        source="github.com/FreedomIntelligence/MultilingualSIFT@c3721d9",
        license="Apache-2.0",
    ),
    _row(
        "mgsm",
        mgsm.conversations,
        "mgsm/mgsm/mgsm_*.tsv",
        kind="multilingual_instruction",
        source=_URL_NLP,
        license="CC BY 4.0",
    ),
)

RECIPES: dict[str, tuple[RawSource, ...]] = {
    "real": _REAL,  # conversations to train on
    "everything": _EVERYTHING,  # and instructions, translations and the questions of benchmarks
}

# What else is in the folder of raw data, and why `everything` does not read it.
LEFT_OUT = {
    "*/SOURCE.txt": "provenance",
    "*LICENSE": "licence",
    "*README.md": "description",
    "*/linguameta.tsv": "numbers of speakers",
    "llama-factory/data/dataset_info.json": "a list of datasets",
    "seeds-en/prompt.txt": "the prompt that seeds are put into",
    "fastchat/*/judge_prompts.jsonl": "prompts of a judge",
    "fastchat/*/reference_answer/*": "answers to a benchmark's questions, for the judge",
    "llmzoo/*/answers/*": "what models answered to a benchmark's questions",
    "llmzoo/*/prompts/*": "prompts of a judge",
    "llmzoo/*/reviews/*": "what a judge wrote",
    "tatoeba/*/tatoeba.???-eng.*": "the other half of each .eng, read with it",
}


def load_recipe(name: str) -> tuple[RawSource, ...]:
    """The rows of a recipe, by its name or the path of a Python file that has a ``RECIPE``."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".py"):
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}" if near else f"there are {', '.join(sorted(RECIPES))}"
        raise InputError(f"--recipe={name}: {hint}; or give a Python file that has a RECIPE")
    if not os.path.isfile(name):
        raise InputError(f"--recipe={name}: no such file")
    spec = importlib.util.spec_from_file_location(os.path.basename(name).removesuffix(".py"), name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = getattr(module, "RECIPE", ())
    if not rows or not all(isinstance(row, RawSource) for row in rows):
        raise InputError(f"--recipe={name}: it needs RECIPE = (RawSource(...), ...)")
    return tuple(rows)
