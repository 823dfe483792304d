"""Any table: JSON, JSON Lines, Parquet, CSV or a hub dataset, by the names of its columns.

    conversations("faq.csv", columns={"prompt": "Frage", "response": "Antwort"}, lang="de", ...)
    conversations("hub:OWNER/NAME", columns={"messages": "dialog", "lang": "language"}, ...)

``columns`` says which column is which of

- prompt, response: what the user says, and the answer. Without a response, records are questions.
- system, history: what stands before them; history is a list of [user, assistant] pairs.
- messages: in place of these, all turns, as OpenAI's or ShareGPT's; a string of JSON will do.
- lang: BCP-47.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.sources import (
    Item,
    Question,
    Unusable,
    alpaca,
    convert,
    language_of,
    messages,
    read_records,
    sharegpt,
    text_of,
)
from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError

ROLES = ("prompt", "response", "system", "history", "messages", "lang")


def conversations(
    path: str,
    *,
    columns: Mapping[str, str],
    lang: str | Callable[[str], str] = "und",
    **about: str,
) -> Iterator[Item]:
    """See ``sources.convert``; ``lang`` is that of records whose column for it is empty.

    Raises InputError where ``columns`` makes no sense, or names one that the first record has not.
    """
    check(columns, where=path)
    items = convert(
        _checked(path, columns),
        lambda record: to_messages(record, columns),
        lang=lang,
        own=lambda record: language_of(record, *([columns["lang"]] if "lang" in columns else [])),
        **about,
    )
    if "response" in columns or "messages" in columns:
        return items
    return map(_question, items)


def check(columns: Mapping[str, str], *, where: str) -> None:
    for role in columns:
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ROLES)}"
            raise InputError(f"{where}: columns has the unknown key {role!r}; {hint}")
    if ("messages" in columns) == ("prompt" in columns):
        raise InputError(f"{where}: columns must have either 'messages' or 'prompt'")
    if "messages" in columns and (more := sorted(columns.keys() - {"messages", "lang"})):
        raise InputError(f"{where}: columns has 'messages', which replaces {', '.join(more)}")
    if "response" not in columns and (more := sorted(columns.keys() & {"system", "history"})):
        raise InputError(f"{where}: columns has no response, so {', '.join(more)} cannot be used")


def to_messages(record: dict[str, Any], columns: Mapping[str, str]) -> list[Message]:
    if "messages" in columns:
        return _turns(record, columns["messages"])
    if "response" not in columns:
        return [Message("user", text_of(record, columns["prompt"]))]
    fields = {"instruction": text_of(record, columns["prompt"])}
    if "system" in columns:
        fields["system"] = record.get(columns["system"])
    if "history" in columns:
        fields["history"] = _json(record.get(columns["history"]))
        if not isinstance(fields["history"], list | None):
            raise Unusable("no text", f"history is {fields['history']!r:.80}, not a list of pairs")
    return alpaca.to_messages({**fields, "output": text_of(record, columns["response"])})


def _turns(record: dict[str, Any], column: str) -> list[Message]:
    turns = _json(record.get(column))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return sharegpt.to_messages({"conversations": turns})
    return messages.to_messages({"messages": turns})


def _json(value: Any) -> Any:
    """A list may stand in a cell as a string of JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON", str(error)) from error


def _checked(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The records, once the first that can be read has all the columns."""
    known = False
    for where, record in read_records(path):
        if not known and isinstance(record, dict):
            known = True
            for role, column in columns.items():
                if column not in record:
                    near = difflib.get_close_matches(column, record, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise InputError(
                        f"{where}: no column {column!r}, which columns names for {role!r}{hint};"
                        f" there are {', '.join(map(str, record))}"
                    )
        yield where, record


def _question(item: Item) -> Item:
    if not isinstance(item, Conversation):
        return item
    turns = tuple(message.content for message in item.messages)
    about = {"lang": item.lang, "kind": item.kind, "source": item.source, "license": item.license}
    return Question(id=item.id, question_id=item.id, turns=turns, **about)
