"""MultilingualSIFT: one file a language, which its name ends with.

Conversations are as in ShareGPT, as in ``alpaca-gpt4-arabic.json``; questions are Vicuna's 80,
translated, as in ``questions_Arabic.jsonl``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_pipelines.sources import Item, questions, sharegpt
from llmzoo_jax.errors import InputError

LANGUAGES = {
    "arabic": "ar", "chinese": "zh", "deutsch": "de", "english": "en", "french": "fr",
    "german": "de", "hindi": "hi", "indonesian": "id", "italian": "it", "japanese": "ja",
    "korean": "ko", "portuguese": "pt", "spanish": "es",
}  # fmt: skip


def conversations(path: str, **about: str) -> Iterator[Item]:
    """See ``sources.convert``; raises InputError where the file's name has no known language."""
    stem = os.path.basename(path).partition(".")[0].lower()
    code = LANGUAGES.get(re.split("[-_]", stem)[-1])
    if code is None:
        raise InputError(f"{path}: the name must end with one of {', '.join(LANGUAGES)}")
    if stem.startswith("questions"):
        return questions.conversations(path, lang=code, benchmark="vicuna-80", **about)
    return sharegpt.conversations(path, lang=code, **about)
