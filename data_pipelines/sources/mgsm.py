"""MGSM: a line is a question, a tab and the number that is its answer.

A benchmark in eleven languages, so its records are questions with a reference, not conversations
to train on. The language is in the file's name, as in ``mgsm_th.tsv``; the same line of two files
is the same question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_pipelines.sources import Dropped, Question
from data_pipelines.sources.records import read_lines
from llmzoo_jax.errors import InputError


def conversations(path: str, **about: str) -> Iterator[Question | Dropped]:
    """The questions of a file; raises InputError where its name has no language."""
    name = os.path.basename(path)
    match = re.fullmatch(r"mgsm_([a-z]{2,3})\.tsv", name)
    if not match:
        raise InputError(f"{path}: the name must be mgsm_LANG.tsv, as mgsm_th.tsv")
    for number, line in enumerate(read_lines(path), 1):
        where = f"{name}:{number}"
        cells = line.split("\t")
        if len(cells) != 2 or not all(cells):
            yield Dropped(where, "wrong number of cells", f"{len(cells)}, not 2: {line!r:.80}")
            continue
        question, answer = cells
        yield Question(id=where, question_id=f"mgsm:{number}", turns=(question,),
                       reference=(answer,), category="math", lang=match[1], **about)  # fmt: skip
