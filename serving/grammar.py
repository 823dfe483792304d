"""Answers that must have a form: JSON schema, regular expression, grammar, choice (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np

from llmzoo_jax.byte_tokens import token_bytes
from llmzoo_jax.inference import Model
from serving.protocol import ApiError, ResponseFormat
from serving.requests import Grammar

JSON_OBJECT = {"type": "object"}
# Between the parts of JSON: room to indent, but a model that likes spaces has to go on.
JSON_OPTIONS = {"whitespace_pattern": "[ \\n\\t]{0,20}"}
KEPT = 64  # compiled grammars


class TokenGrammar:
    """``requests.Grammar`` by llguidance. A stop token is allowed where the text may end."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self._matcher, self._mask = matcher, np.zeros(words, np.int32)

    def mask(self) -> Sequence[int]:
        """int32 ``[ceil(V / 32)]``, of this object's own memory; overwritten by the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"grammar: {self._matcher.get_error()}")


class Grammars:
    """Makes the grammars of requests to one model."""

    def __init__(self, model: Model):
        self._model = model
        self._compiled = functools.lru_cache(maxsize=KEPT)(self._compile)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        """Made at the first request: it takes a second or so for a large vocabulary."""
        model = self._model
        wrapped = llguidance.TokenizerWrapper(_Tokens(model))
        return llguidance.LLTokenizer(
            wrapped, n_vocab=model.config.vocab_size, eos_token=list(model.stop_ids)
        )

    def of(self, request: Any) -> Callable[[], Grammar | None]:
        """What makes a fresh grammar for each choice; of none where the request asks for none.
        ApiError for what is no schema, expression or grammar."""
        structured = request.structured_outputs
        shape = getattr(request, "response_format", None)
        asked = [] if structured is None else [
            (kind, value)
            for kind, value in (
                ("json", structured.json_),
                ("regex", structured.regex),
                ("choice", structured.choice),
                ("grammar", structured.grammar),
            )
            if value is not None
        ]  # fmt: skip
        if structured is not None and len(asked) != 1:
            raise ApiError(
                "structured_outputs takes one of json, regex, choice, grammar",
                param="structured_outputs",
            )
        name = "structured_outputs"
        if shape is not None and shape.type != "text":
            if asked:
                raise ApiError(
                    "give response_format or structured_outputs, not both", param="response_format"
                )
            name, asked = "response_format", [("json", _schema(shape))]
        if not asked:
            return lambda: None
        self._check(request, name)
        kind, value = asked[0]
        matcher = self._compiled(name, kind, json.dumps(value, ensure_ascii=False))
        words = -(-self._model.config.vocab_size // 32)
        return lambda: TokenGrammar(matcher.deep_copy(), words)

    def _check(self, request: Any, name: str) -> None:
        """At its end only a stop token may follow, so there must be one, and it must be allowed."""
        if not self._model.stop_ids:
            raise ApiError(f"{name}: the model has no stop token", param=name)
        for other in ("ignore_eos", "min_tokens"):
            if getattr(request, other):
                raise ApiError(f"{other} can't be used with {name}", param=other)

    def _compile(self, name: str, kind: str, value: str) -> llguidance.LLMatcher:
        value = json.loads(value)
        make = llguidance.LLMatcher
        try:
            if kind == "json":
                text = make.grammar_from_json_schema(value, defaults=JSON_OPTIONS)
            elif kind == "regex":
                text = make.grammar_from_regex(value)
            elif kind == "choice":
                if not value or not all(value):
                    raise ValueError("choice needs texts, none of them empty")
                text = make.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
            else:
                text = make.grammar_from_lark(value)
        except ValueError as error:
            raise ApiError(f"{name}: {error}", param=name) from error
        matcher = make(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            why = matcher.get_error().strip()
            raise ApiError(f"{name}: {why}", param=name, code="invalid_grammar")
        return matcher


def _schema(shape: ResponseFormat) -> dict[str, Any]:
    if shape.type == "json_object":
        return JSON_OBJECT
    if shape.json_schema is None or shape.json_schema.schema_ is None:
        raise ApiError("response_format: json_schema has no schema", param="response_format")
    return shape.json_schema.schema_


class _Tokens:
    """A tokenizer as llguidance wants it: the bytes of every token, special ones marked."""

    def __init__(self, model: Model):
        tokenizer, size = model.tokenizer, model.config.vocab_size
        known = token_bytes(tokenizer, len(tokenizer))
        text = list(known.text[:size]) + [b""] * (size - len(known.text))
        special = known.special | set(model.stop_ids)
        self.tokens = [b"\xff" + t if i in special else t for i, t in enumerate(text)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = model.stop_ids[0] if model.stop_ids else None
        self.bos_token_id = tokenizer.bos_token_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Without the space that some tokenizers put before a text."""
        before = self._tokenizer("\x02", add_special_tokens=False).input_ids
        ids = self._tokenizer("\x02" + text, add_special_tokens=False).input_ids
        if ids[: len(before)] != before:
            return self._tokenizer(text, add_special_tokens=False).input_ids
        return ids[len(before) :]
