"""Self-instruct seeds: ``{"id", "name", "instruction", "instances": [{"input", "output"}, ...]}``.

Each instance is a conversation, with the user's message as in Alpaca.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.sources import Dropped, Unusable, alpaca, convert, list_of, read_records
from llmzoo_jax.conversation import Conversation


def conversations(
    path: str, *, lang: str | Callable[[str], str], **about: str
) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``; the second instance of a record has the id ``file:number/2``."""
    return convert(instances(path), alpaca.to_messages, lang=lang, **about)


def instances(path: str) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    for where, record in read_records(path):
        try:
            if isinstance(record, Unusable):
                raise record
            found = list_of(record, "instances")
        except Unusable as error:
            yield where, error
            continue
        for number, instance in enumerate(found, 1):
            name = where if number == 1 else f"{where}/{number}"
            if isinstance(instance, dict):
                yield name, {**instance, "instruction": record.get("instruction")}
            else:
                yield name, Unusable("not an object", f"{instance!r:.80}")
