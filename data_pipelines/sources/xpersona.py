"""XPersona: ``{"persona": [sentence, ...], "dialogue": [[user, reply], ...]}``.

The persona is that of the replies, and becomes the system message. The language is in the name of
the file, as in ``Jp_persona_split_test_human_annotated.json``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from data_pipelines.sources import Dropped, Unusable, convert, list_of
from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError

LANGUAGES = {
    "En": "en", "Fr": "fr", "Id": "id", "It": "it", "Jp": "ja", "Ko": "ko", "Zh": "zh",
}  # fmt: skip


def conversations(path: str, **about: str) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``; raises InputError where the file's name has no known language."""
    code = os.path.basename(path).partition("_")[0]
    if code not in LANGUAGES:
        raise InputError(f"{path}: the name must start with one of {', '.join(LANGUAGES)} and _")
    return convert(path, to_messages, lang=LANGUAGES[code], **about)


def to_messages(record: dict[str, Any]) -> list[Message]:
    messages = [Message("system", "\n".join(record["persona"]))] if record.get("persona") else []
    for pair in list_of(record, "dialogue"):
        if not (isinstance(pair, list) and list(map(type, pair)) == [str, str]):
            raise Unusable("no text", f"the dialogue has {pair!r:.80}, not [user, reply]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages
