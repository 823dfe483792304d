"""Conversations as tokens: load a tokenizer, resolve a chat format on it, encode, show.

The rendered text of a conversation is tokenised once, with ``add_special_tokens=False``: what a
tokenizer would add (LLaMA's BOS) is in the text of the resolved format. The loss mask comes from
the text that each token stands for, in bytes or characters, never from special ids.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmzoo_jax.byte_tokens import byte_lengths, byte_mask
from llmzoo_jax.conversation import (
    FORMATS,
    ChatFormat,
    Conversation,
    ConversationError,
    Message,
    Segment,
    chat_template,
    check_messages,
    render,
)
from llmzoo_jax.errors import InputError
from llmzoo_jax.llama_tokenizer import from_sentencepiece


@dataclass(frozen=True)
class Example:
    """A conversation as tokens."""

    tokens: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # bool[n]: token i is a target of the loss (packing does the shift)


# --- loading and saving -------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Any:
    """A transformers fast tokenizer from a folder, or from the path of a ``tokenizer.model``.

    ``tokenizer.json`` is taken as it is, whatever class ``tokenizer_config.json`` names: some of
    the classes of transformers 5 rebuild the tokenizer by rules of their own (LlamaTokenizer drops
    the normalizer, so that the first word after a special token gets other ids). Nothing is
    downloaded. Raises InputError that says what was looked for.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        path = path.parent
    if path.is_file():
        return from_sentencepiece(path)
    if not path.is_dir():
        raise InputError(
            f"tokenizer: no folder or file {str(path)!r}; give a folder that has a tokenizer.json"
            " or a SentencePiece tokenizer.model, or the path of a tokenizer.model"
        )
    if (path / "tokenizer.json").is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        except Exception as error:
            raise InputError(
                f"tokenizer: cannot read {path / 'tokenizer.json'}: {error}"
            ) from error
    if (path / "tokenizer.model").is_file():
        return from_sentencepiece(path / "tokenizer.model")
    names = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
    raise InputError(
        f"tokenizer: {path} has no tokenizer.json and no tokenizer.model (it has {names});"
        " convert a slow tokenizer first: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def save_tokenizer(tokenizer: Any, folder: str | Path, *, chat_format: ChatFormat) -> None:
    """Writes the tokenizer with the chat template of the format, for old and new readers.

    ``PreTrainedTokenizerFast`` is the class that transformers 4 and 5 both know, and that takes
    tokenizer.json as it is.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template(chat_format)
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"chat_template": tokenizer.chat_template}  # where older readers look for it
    for name in ("is_local", "local_files_only"):  # how it was loaded here, which transformers adds
        config.pop(name, None)
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")


# --- formats on a tokenizer ---------------------------------------------------------------------


def resolve_format(name: str, tokenizer: Any) -> ChatFormat:
    """The chat format ``name`` on this tokenizer: its BOS comes first where the tokenizer adds one.

    ``"tokenizer"`` is the tokenizer's own chat template, which writes BOS itself or not at all.
    Raises InputError for an unknown name, and where a special token of the format is not one token.
    """
    if name == "tokenizer":
        return _own_format(tokenizer)
    if name not in FORMATS:
        names = [*FORMATS, "tokenizer"]
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown chat format {name!r}; {hint}There are {', '.join(names)}")
    chat_format = FORMATS[name]
    for token in chat_format.special_tokens:
        _check_token(token, tokenizer, name)
    begin = _added_before(tokenizer)
    start = "".join(s.text for s in render([Message("user", "x")], chat_format))
    if begin and not start.startswith(begin):
        _check_token(begin, tokenizer, name)
        chat_format = dataclasses.replace(chat_format, begin=begin)
    return chat_format


def _added_before(tokenizer: Any) -> str:
    """What the tokenizer puts before a text by itself: BOS or nothing.

    Found by trying: ``bos_token`` and ``add_bos_token`` may be missing from a folder.
    """
    bare = tokenizer("x", add_special_tokens=False).input_ids
    full = tokenizer("x").input_ids
    starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return "".join(tokenizer.convert_ids_to_tokens(full[: next(starts, 0)]))


def _check_token(token: str, tokenizer: Any, name: str) -> None:
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != token:
        raise InputError(
            f"chat format {name!r} needs {token!r} as one token, and this tokenizer has no such"
            " token; use another chat format, or add it to the tokenizer and its row to the model"
        )


@dataclass(frozen=True)
class JinjaTemplate:
    """A checkpoint's own chat template; calling it gives segments, as ``render`` does."""

    source: str
    variables: tuple[tuple[str, str], ...]  # ("bos_token", "<s>") ...
    closing: str = ""  # what it writes after an answer

    def text(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            texts, _ = render_jinja_template(
                [chat],
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                **dict(self.variables),
            )
        except TemplateError as error:
            raise ConversationError(f"the tokenizer's chat template refuses: {error}") from error
        return texts[0]

    def __call__(self, messages: Sequence[Message], generation_prompt: bool) -> list[Segment]:
        """Finds the answers in the text by rendering the conversation up to each of them."""
        whole = self.text(messages, generation_prompt)
        if generation_prompt:  # to be served as it is; nothing is trained
            return [Segment(whole, False)]
        segments, done = [], 0
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.text(messages[:turn], True)
            answer = self.text(messages[: turn + 1])
            if answer.endswith(self.closing):  # the model never has to write the space after it
                answer = answer[: len(answer) - len(self.closing) + len(self.closing.rstrip())]
            for text, train in ((prompt, False), (answer, message.trained)):
                if not whole.startswith(text) or len(text) < done:
                    what = "prompt before it" if text is prompt else "text up to it"
                    raise ConversationError(
                        f"turn {turn + 1} ({message.role}): the tokenizer's chat template writes"
                        f" the {what} differently in the whole conversation, so a model would be"
                        " trained on other text than it is served; use another chat format"
                    )
                segments.append(Segment(whole[done : len(text)], train))
                done = len(text)
        segments.append(Segment(whole[done:], False))
        return [segment for segment in segments if segment.text]


def _own_format(tokenizer: Any) -> ChatFormat:
    source = tokenizer.chat_template
    if isinstance(source, dict):  # several templates: apply_chat_template takes this one, too
        source = source.get("default")
    if not source:
        raise InputError(
            "chat format 'tokenizer' is the tokenizer's own chat template, and it has none; use"
            f" one of {', '.join(FORMATS)}"
        )
    template = JinjaTemplate(source, tuple(sorted(tokenizer.special_tokens_map.items())))
    try:
        probe = template.text([Message("user", "question"), Message("assistant", "answer")])
    except ConversationError as error:
        raise InputError(f"chat format 'tokenizer': {error}") from error
    closing = probe.rpartition("answer")[2]
    if not closing.strip():
        raise InputError(
            "chat format 'tokenizer': the template writes nothing after an answer, so a model could"
            f" not learn to stop; use one of {', '.join(FORMATS)}"
        )
    # Tokens that the template writes may not be marked as special; spaces and words are not meant.
    added = (t for t in tokenizer.added_tokens_encoder if t in probe)
    tokens = tuple(t for t in added if t.strip() and not t.isalnum())
    end = _specials(tokenizer, len(tokenizer), tokens).search(closing)
    return ChatFormat(
        name="tokenizer",
        template=dataclasses.replace(template, closing=closing),
        stop=(end.group() if end else closing.strip(),),
        special_tokens=tokens,
    )


# --- encoding -----------------------------------------------------------------------------------


def encode(
    conversation: Conversation, *, tokenizer: Any, chat_format: ChatFormat, where: str = ""
) -> Example:
    """The tokens of a conversation; those that overlap trained text are targets of the loss.

    They begin with the tokens of ``encode_prompt`` for the history of each answer. (In the formats
    alpaca and chatml, whose prompts end in plain text, an answer that begins with a punctuation
    mark or white space may share a token with the prompt's end, as in the originals.)

    Raises ConversationError, beginning with ``where`` and naming the turn, for messages that are
    out of order, contain a special token of the tokenizer, or have text that it cannot represent.
    """
    where = where or conversation.id
    check_messages(conversation.messages, where=where)
    segments = checked_segments(conversation.messages, tokenizer, chat_format, where, False)
    tokens, spans = _tokenize(segments, conversation.messages, tokenizer, where)
    mask = byte_mask(tokens, segments, byte_lengths(tokenizer, len(tokenizer)))
    if mask is not None:
        return Example(tokens, mask)
    lengths = [len(segment.text) for segment in segments]
    trained = np.repeat([segment.train for segment in segments], lengths)
    before = np.concatenate([[0], np.cumsum(trained)])  # trained characters before each position
    return Example(tokens, before[spans[:, 1]] > before[spans[:, 0]])


def encode_prompt(
    messages: Sequence[Message], *, tokenizer: Any, chat_format: ChatFormat
) -> list[int]:
    """The tokens of a history, up to where the model begins to speak; raises as ``encode``."""
    check_messages(messages, generation_prompt=True)
    segments = checked_segments(messages, tokenizer, chat_format, "", True)
    return _tokenize(segments, messages, tokenizer, "")[0].tolist()


def checked_segments(messages, tokenizer, chat_format, where, generation_prompt) -> list[Segment]:
    """``render``, where no text forges a special token; raises as ``encode``."""
    at = f"{where}: " if where else ""
    specials = _specials(tokenizer, len(tokenizer), chat_format.special_tokens)
    for number, message in enumerate(messages, 1):
        if forged := specials.search(message.content):
            raise ConversationError(
                f"{at}turn {number} ({message.role}): the text contains {forged.group()!r}, a"
                " special token that could forge a turn; remove it, or drop the conversation"
            )
    try:
        return render(messages, chat_format, generation_prompt=generation_prompt)
    except ConversationError as error:
        raise ConversationError(f"{at}{error}") from error


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Any, size: int, more: tuple[str, ...]) -> re.Pattern:
    """Finds special tokens in text. ``size`` is the tokenizer's: it changes as tokens are added."""
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    longest_first = sorted({*added, *more}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _tokenize(segments, messages, tokenizer, where) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32[n] and their spans of characters int64[n, 2], which leave no gaps."""
    text = "".join(segment.text for segment in segments)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.asarray(coded.input_ids, np.int32)
    spans = np.asarray(coded.offset_mapping, np.int64).reshape(-1, 2)
    # Lost: the unk token, but not its own name, as unk may also be eos (GPT-2); and what has no
    # token at all where there is no unk, with which the spans would be wrong too.
    lost = [text[a:b] for a, b in spans[tokens == tokenizer.unk_token_id]]
    lost = [unknown for unknown in lost if unknown != tokenizer.unk_token]
    characters = sorted(set().union(*(message.content for message in messages)))
    lost += [c for c in characters if not has_tokens(tokenizer, len(tokenizer), c)]
    if lost:
        turns = [n for n, message in enumerate(messages, 1) if lost[0] in message.content]
        at = (f"{where}: " if where else "") + (f"turn {turns[0]}: " if turns else "")
        raise ConversationError(
            f"{at}the tokenizer cannot represent {lost[0]!r}; remove it, or drop the conversation"
        )
    if len(spans):  # some tokenizers leave white space out: it belongs to the token after it
        spans[1:, 0] = np.minimum(spans[1:, 0], np.maximum.accumulate(spans[:-1, 1]))
        spans[0, 0] = 0
    return tokens, spans


@functools.lru_cache(maxsize=1 << 16)
def has_tokens(tokenizer: Any, size: int, character: str) -> bool:
    """Whether a character that is no white space has tokens, all of its bytes included."""
    if character.isspace() or character == "\ufffd":
        return True
    tokens = tokenizer(character, add_special_tokens=False).input_ids
    return bool(tokens) and "\ufffd" not in tokenizer.decode(tokens)


def fingerprint(tokenizer: Any, chat_format: ChatFormat) -> str:
    """A hash of everything that decides the tokens and masks of ``encode``: a cache key."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # a call sets these two, and `encode` uses neither
    state.pop("padding", None)
    version = 2  # of `encode`: another one makes other tokens or masks of the same text
    parts = [version, state, dataclasses.asdict(chat_format)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# --- looking ------------------------------------------------------------------------------------


def show(example: Example, *, tokenizer: Any, color: bool = True) -> str:
    """The text of an example: trained tokens green and the others grey, or the trained in ⟦ ⟧."""
    begin = {True: "\033[32m", False: "\033[90m"} if color else {True: "⟦", False: ""}
    end = {True: "\033[0m", False: "\033[0m"} if color else {True: "⟧", False: ""}
    out, now = [], None
    for text, train in _characters(example, tokenizer):
        if train is not now:
            out += [end[now]] if now is not None else []
            out += [begin[train]]
            now = train
        out.append(text)
    return "".join(out) + ("" if now is None else end[now])


def _characters(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, trained) of each smallest group of tokens that is a whole number of characters."""
    context: list[int] = []  # the group before: what a token reads as may depend on it
    group: list[int] = []
    for i, (token, train) in enumerate(zip(example.tokens.tolist(), example.loss_mask.tolist())):  # noqa: B905
        group.append(token)
        text = tokenizer.decode(context + group, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and i + 1 < len(example.tokens):
            continue  # part of a character
        skip = len(tokenizer.decode(context, clean_up_tokenization_spaces=False))
        yield text[skip:], train
        context, group = group, []
