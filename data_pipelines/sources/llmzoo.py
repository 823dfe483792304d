"""LLM Zoo, as phoenix-sft-data-v1: ``{"id", "type", "conversations": [{"from", "value"}, ...]}``.

``type`` says what the record is; ``lang`` or ``language`` its language, where there is one. LLM
Zoo trains on turns of any other role as "unknown"; here such a record is dropped, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.sources import Dropped, Unusable, convert, language_of, sharegpt
from llmzoo_jax.conversation import KINDS, Conversation

TYPES = {
    **{kind: kind for kind in KINDS},
    "instruction": "multilingual_instruction",
    "conversation": "conversation",
}


def conversations(
    path: str,
    *,
    kind: str,
    lang: str | Callable[[str], str] = "und",
    types: Mapping[str, str] = TYPES,
    **about: str,
) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``. ``types`` is type -> kind; ``kind`` is that of records without a
    type, ``lang`` the language of those without one."""

    def own(record: dict[str, Any]) -> dict[str, str]:
        fields = language_of(record, "lang", "language")
        if (type := record.get("type")) is not None:
            if not isinstance(type, str) or type not in types:
                detail = f"{type!r:.80} is none of {', '.join(types)}; name its kind with types="
                raise Unusable("unknown type", detail)
            fields["kind"] = types[type]
        return fields

    return convert(path, sharegpt.to_messages, lang=lang, own=own, kind=kind, **about)
