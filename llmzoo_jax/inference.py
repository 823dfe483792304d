"""A loaded model: logits, text and chat. What ``llmzoo_jax.load`` gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmzoo_jax import embeddings, models, sharding
from llmzoo_jax import generate as decoding
from llmzoo_jax.config import LlamaConfig, ModelConfig
from llmzoo_jax.conversation import FORMATS, ChatFormat, Message, chat_template, render
from llmzoo_jax.errors import InputError
from llmzoo_jax.generate import Sampling
from llmzoo_jax.text_stream import TextStream
from llmzoo_jax.tokenizer import encode_prompt, resolve_format


class LoadError(InputError):
    """A folder can't be used as a model, or a model not in this way; the message says why."""


@dataclass(frozen=True)
class Result:
    """An answer. ``tokens`` are the new ones, up to the stop token or the end of the stop string;
    ``finish_reason`` is "stop" or "length"; ``text`` is None where there is no tokenizer."""

    text: str | None
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True, eq=False)
class Model:
    """A model and what it takes to talk to it.

    ``tokenizer`` is None where the folder has none, ``format`` where there is no chat template.
    ``params`` is the ``nnx`` module in the form that decodes fastest (``generate.prepare``), on one
    device or split over ``mesh``.
    """

    path: str
    config: ModelConfig
    tokenizer: Any = field(repr=False)
    format: ChatFormat | None = field(repr=False)
    params: Any = field(repr=False)
    stop_ids: tuple[int, ...]  # any of them ends an answer
    dtype: str
    mesh: Mesh | None = None

    @property
    def context(self) -> int | None:
        """How many positions the model has; None for BLOOM, whose ALiBi sets no limit."""
        return self.config.max_positions if isinstance(self.config, LlamaConfig) else None

    def logits(self, tokens: Any) -> np.ndarray:
        """``int[B,T] -> float32[B,T,V]``. Rows may be padded on the right."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise LoadError(f"logits: tokens must be int[B,T], not {tokens.dtype}{tokens.shape}")
        self._check_ids(tokens.ravel(), "logits")
        with sharding.use(self.mesh):
            return np.asarray(_logits(self.params, tokens.astype(np.int32), dtype=self.dtype))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Result]:
        """Continues texts or lists of token ids, as one batch.

        A text is tokenised as transformers would, with BOS where the tokenizer adds it. Temperature
        0 is greedy. A ``stop`` string ends a row and is not in its text. Row i samples with
        ``seed + i``, whatever else is in the batch.
        """
        if isinstance(prompts, str):
            raise LoadError("generate: prompts is a list, of texts or of lists of token ids")
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed,
        )  # fmt: skip
        ids = [self._tokenize(prompt) for prompt in prompts]
        streams = [self.text_stream(row, _stops(stop)) for row in ids]
        return self._decode(ids, sampling, streams) if ids else []

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Result:
        """The answer to ``messages`` ({"role", "content"}, the last one the user's).

        ``on_text`` is called every few tokens with the next piece of the text, which may be empty:
        whole characters that no stop string can take back; joined, they are the text of the result.
        Raises ConversationError for messages that the model's chat format can't write.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed,
        )  # fmt: skip
        prompt = self.prompt(messages)
        stream = self.answer_stream(_stops(stop))
        return self._decode([prompt], sampling, [stream], on_text)[0]

    def prompt(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        """The token ids of ``messages`` in the model's chat format, where it begins to speak."""
        if self.tokenizer is None:
            raise LoadError(f"{self.path} has no tokenizer.json and no tokenizer.model: no chat")
        if self.format is None:
            raise LoadError(
                f"{self.path}: its tokenizer has no chat template, so it is not known how a chat "
                "is written; use generate(), or put a chat_template into tokenizer_config.json"
            )
        turns = [_message(m, number) for number, m in enumerate(messages, 1)]
        return encode_prompt(turns, tokenizer=self.tokenizer, chat_format=self.format)

    def text_stream(
        self, prompt: Sequence[int], stops: Sequence[str] = (), **options: Any
    ) -> TextStream | None:
        """The text that continues ``prompt``; ``options`` are TextStream's. None without a
        tokenizer."""
        if self.tokenizer is not None:
            # It may depend on the last tokens: a space, half a character.
            return TextStream(self.tokenizer, prompt[-8:], stops, **options)
        if stops:
            raise LoadError(f"{self.path} has no tokenizer, so no stop string can be found")
        return None

    def answer_stream(self, stops: Sequence[str] = (), **options: Any) -> TextStream:
        """The text of an answer in the model's chat format."""
        before, after = answer_frame(self.format)
        for text in self.format.stop:  # one token where it can be; else looked for in the text
            stops = (*stops, *(() if _token_id(self.tokenizer, text) is not None else (text,)))
            after = after.partition(text)[0]
        return TextStream(self.tokenizer, (), stops, before, after, **options)

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 ``[B,D]``: the mean of the last hidden states of each prompt's tokens, of length
        1."""
        for i, prompt in enumerate(prompts):
            self._check_ids(prompt, f"prompt {i + 1}")
        with sharding.use(self.mesh):
            return embeddings.embed(self.params, prompts, dtype=self.dtype)

    # --- below the surface ---

    def _tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise LoadError(
                f"{self.path} has no tokenizer.json and no tokenizer.model; give token ids"
            )
        return list(self.tokenizer(prompt).input_ids)

    def _decode(self, prompts, sampling: Sampling, streams, on_text=None) -> list[Result]:
        """``streams`` has a TextStream a row, or None without a tokenizer."""
        for i, prompt in enumerate(prompts):
            self._check_ids(prompt, f"prompt {i + 1}")
            whole = len(prompt) + sampling.max_new_tokens
            if self.context is not None and whole > self.context:
                raise LoadError(
                    f"prompt {i + 1} has {len(prompt)} tokens, with max_new_tokens="
                    f"{sampling.max_new_tokens} that is {whole}, and {self.path} has "
                    f"{self.context} positions; shorten one of the two"
                )

        def show(text: str) -> None:
            if on_text is not None:
                on_text(text)

        def on_tokens(row: int, tokens: list[int]) -> None:
            if streams[row] is not None:
                show(streams[row].feed(tokens[streams[row].count :]))

        def stopped(row: int, tokens: list[int]) -> bool:
            return streams[row] is not None and streams[row].stopped_by is not None

        with sharding.use(self.mesh):
            rows = decoding.generate(
                self.params,
                prompts,
                sampling=sampling,
                stop_ids=self.stop_ids,
                stopped=stopped,
                on_tokens=on_tokens,
                dtype=self.dtype,
            )
        results = []
        for prompt, row, stream in zip(prompts, rows, streams, strict=True):
            text, tokens, reason = None, row.tokens, row.finish_reason
            if stream is not None:
                show(stream.finish(whole=reason == "stop"))
                text = stream.text
                if stream.stopped_by is not None:
                    tokens, reason = tokens[: stream.count], "stop"
            results.append(Result(text, tokens, reason, len(prompt)))
        return results

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        size = self.config.vocab_size
        if bad := [int(i) for i in ids if not 0 <= i < size]:
            raise LoadError(f"{where}: token id {bad[0]}; the model has 0 to {size - 1}")


@functools.partial(sharding.jit, static_argnames=("dtype",))
def _logits(params, tokens, *, dtype: str) -> jax.Array:
    return models.logits(params, tokens, dtype=jnp.dtype(dtype))


def _message(message: Message | Mapping[str, str], number: int) -> Message:
    if isinstance(message, Message):
        return message
    if sorted(message) != ["content", "role"]:
        raise LoadError(f"message {number}: a message has role and content, not {sorted(message)}")
    return Message(**message)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise LoadError("stop: an empty string would stop everything")
    return stops


# --- chat formats on a tokenizer ----------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def answer_frame(chat_format: ChatFormat) -> tuple[str, str]:
    """What the format lets the model write before and after the content of an answer: a space and
    ``</s>``, say. Found by writing one, so it holds for a checkpoint's own template, too."""
    question = [Message("user", "question")]
    prompt, whole = (
        "".join(s.text for s in render(messages, chat_format, generation_prompt=prompting))
        for messages, prompting in (
            (question, True),
            ([*question, Message("assistant", "☞")], False),
        )
    )
    before, _, after = whole.removeprefix(prompt).partition("☞")
    return before, after


def find_format(tokenizer: Any) -> ChatFormat | None:
    """The format of a tokenizer's chat template: one of FORMATS if it is the template that one
    writes, else "tokenizer", the template itself; None where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    for name in FORMATS:
        try:
            chat_format = resolve_format(name, tokenizer)
        except InputError:  # this tokenizer lacks a special token of the format
            continue
        if chat_template(chat_format) == tokenizer.chat_template:
            return chat_format
    return resolve_format("tokenizer", tokenizer)


def stop_token_ids(tokenizer: Any, chat_format: ChatFormat | None) -> tuple[int, ...]:
    """EOS, and the tokens that end an answer in the format; sorted."""
    texts = (tokenizer.eos_token, *(chat_format.stop if chat_format else ()))
    ids = [_token_id(tokenizer, text) for text in texts if text]
    return tuple(sorted({i for i in ids if i is not None}))


def _token_id(tokenizer: Any, text: str) -> int | None:
    return tokenizer.backend_tokenizer.token_to_id(text)
