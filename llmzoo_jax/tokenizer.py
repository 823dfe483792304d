"""Conversations as tokens: load a tokenizer, resolve a chat format on it, encode, show."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmzoo_jax.conversation import (
    FORMATS,
    ChatFormat,
    Conversation,
    ConversationError,
    Message,
    Segment,
    check_messages,
    render,
)


@dataclass(frozen=True)
class Example:
    """A conversation as tokens."""

    tokens: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # bool[n]: token i is a target of the loss (the shift is in packing)


# --- loading ------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Any:
    """A transformers fast tokenizer from a folder, or from a SentencePiece ``tokenizer.model``.

    ``tokenizer.json`` is taken as it is, whatever class ``tokenizer_config.json`` names: in
    transformers 5 some of those classes rebuild the tokenizer by rules of their own.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    if path.is_file():
        return _from_sentencepiece(path)
    if not path.is_dir():
        raise ValueError(
            f"tokenizer: no folder or file {str(path)!r}; give a folder with tokenizer.json (or a"
            " SentencePiece tokenizer.model), or the path of a tokenizer.model"
        )
    if (path / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path / "tokenizer.model")
    names = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
    raise ValueError(
        f"tokenizer: {path} has neither tokenizer.json nor tokenizer.model (it has {names}); a"
        " slow tokenizer must be converted first: load it with transformers where it came from,"
        " then save_pretrained() to this folder"
    )


def _from_sentencepiece(path: Path) -> Any:
    """LLaMA 1 and 2: a SentencePiece BPE model with byte fallback, as Hugging Face's fast one."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise ValueError(f"tokenizer: {path} is not a SentencePiece model ({error})") from error
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for rank, piece in enumerate(proto.pieces):
        if piece.type != 1 or len(piece.piece) < 2:
            continue
        text = piece.piece
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                merges.append((-piece.score, rank, -cut, text[:cut], text[cut:]))
    merges = [(left, right) for *_, left, right in sorted(merges)]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


# --- formats on a tokenizer ---------------------------------------------------------------------


@dataclass(frozen=True)
class JinjaTemplate:
    """A jinja chat template with the values of its variables (``bos_token`` and the like)."""

    source: str
    variables: tuple[tuple[str, str], ...] = ()

    def __call__(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": m.role, "content": m.content} for m in messages]
        texts, _ = render_jinja_template(
            [chat],
            chat_template=self.source,
            add_generation_prompt=generation_prompt,
            **dict(self.variables),
        )
        return texts[0]


def resolve_format(name: str, tokenizer: Any) -> ChatFormat:
    """The chat format ``name`` on this tokenizer: its BOS comes first where the tokenizer adds one.

    ``"tokenizer"`` is the tokenizer's own chat template. Raises ValueError for an unknown name,
    and where a special token of the format is not one token of the tokenizer.
    """
    if name == "tokenizer":
        return _own_template(tokenizer)
    if name not in FORMATS:
        names = [*FORMATS, "tokenizer"]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown chat format {name!r}; {hint}There are {', '.join(names)}")
    chat_format = FORMATS[name]
    for token in chat_format.special_tokens:
        _check_token(token, tokenizer, name)
    bos = tokenizer.bos_token
    start = "".join(s.text for s in render([Message("user", "x")], chat_format))
    with_bos = bos is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    if with_bos and not start.startswith(bos):
        _check_token(bos, tokenizer, name)
        chat_format = dataclasses.replace(chat_format, begin=bos)
    return chat_format


def _check_token(token: str, tokenizer: Any, name: str) -> None:
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"chat format {name} needs {token!r} as one token, and this tokenizer writes it as"
            f" {len(ids)}; use another chat format, or add the token to the tokenizer and the model"
        )


def _own_template(tokenizer: Any) -> ChatFormat:
    if not tokenizer.chat_template:
        raise ValueError("chat format 'tokenizer': this tokenizer has no chat template; name one")
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError("chat format 'tokenizer': the tokenizer has several templates")
    template = JinjaTemplate(
        tokenizer.chat_template, tuple(sorted(tokenizer.special_tokens_map.items()))
    )
    question, answer = Message("user", "question"), Message("assistant", "answer")
    after = template([question, answer], False).rpartition("answer")[2]
    stop = after.strip() or tokenizer.eos_token
    return ChatFormat(
        name="tokenizer",
        template=template,
        assistant=("", after),
        trained=("", after.rstrip()),
        stop=(stop,),
        special_tokens=(stop,),
    )


# --- encoding -----------------------------------------------------------------------------------


def encode(
    conversation: Conversation, *, tokenizer: Any, chat_format: ChatFormat, where: str = ""
) -> Example:
    """Tokenises the whole rendered text once; the mask comes from character offsets.

    Raises ConversationError, naming ``where`` and the turn, for messages that are out of order,
    contain a special token of the tokenizer, or cannot be represented.
    """
    where = where or conversation.id or "conversation"
    check_messages(conversation.messages, where=where)
    segments = _render(conversation.messages, tokenizer, chat_format, where, False)
    ids, offsets = _tokenize(segments, conversation.messages, tokenizer, where)
    edges = np.cumsum([0] + [len(s.text) for s in segments])
    trained = np.zeros(edges[-1] + 1, np.int64)  # trained characters before each position
    for segment, start in zip(segments, edges, strict=False):
        trained[start + 1 : start + 1 + len(segment.text)] = segment.train
    trained = np.cumsum(trained)
    mask = trained[offsets[:, 1]] > trained[offsets[:, 0]]
    return Example(ids, mask)


def encode_prompt(
    messages: Sequence[Message], *, tokenizer: Any, chat_format: ChatFormat
) -> list[int]:
    """The tokens of a history, up to where the model begins to speak."""
    check_messages(messages, where="messages", generation_prompt=True)
    segments = _render(messages, tokenizer, chat_format, "messages", True)
    return _tokenize(segments, messages, tokenizer, "messages")[0].tolist()


def _render(messages, tokenizer, chat_format, where, generation_prompt) -> list[Segment]:
    forged = _special_pattern(tokenizer, chat_format.special_tokens)
    for number, message in enumerate(messages, 1):
        if found := forged.search(message.content):
            raise ConversationError(
                f"{where}: turn {number} ({message.role}): the text contains the special token"
                f" {found.group()!r}, which would forge a turn; remove it"
            )
    try:
        return render(messages, chat_format, generation_prompt=generation_prompt)
    except ConversationError as error:
        raise ConversationError(f"{where}: {error}") from error


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: Any, more: tuple[str, ...]) -> re.Pattern:
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(re.escape(t) for t in sorted({*added, *more}, key=len)[::-1]))


def _tokenize(segments, messages, tokenizer, where) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32[n] and character spans int64[n, 2] that leave no gap between them."""
    text = "".join(s.text for s in segments)
    coded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    ids = np.asarray(coded.input_ids, np.int32)
    offsets = np.asarray(coded.offset_mapping, np.int64).reshape(-1, 2)
    for start, end in offsets[ids == tokenizer.unk_token_id]:
        if text[start:end] != tokenizer.unk_token:
            raise ConversationError(
                f"{where}: the tokenizer has no token for {text[start:end]!r}; drop the text"
            )
    if len(offsets):
        # Some tokenizers leave white space out of the spans: it belongs to the token after it.
        offsets[1:, 0] = np.minimum(offsets[1:, 0], offsets[:-1, 1])
    return ids, offsets


def fingerprint(tokenizer: Any, chat_format: ChatFormat) -> str:
    """A hash of everything that decides the tokens and masks of ``encode``: a cache key."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # set by calls, and never used here
    state.pop("padding", None)
    parts = [1, state, dataclasses.asdict(chat_format)]  # 1: the version of `encode`
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- looking ------------------------------------------------------------------------------------


def show(example: Example, *, tokenizer: Any, color: bool = True) -> str:
    """The text of an example, trained tokens in green (or in ⟦ ⟧) and the others in grey."""
    trained, other, end = ("\033[32m", "\033[90m", "\033[0m") if color else ("⟦", "", "")
    out, now = [], None
    for text, train in _pieces(example, tokenizer):
        if train != now:
            if not color and now:
                out.append("⟧")
            out.append(trained if train else other)
            now = train
        out.append(text)
    if not color and now:
        out.append("⟧")
    return "".join(out) + end


def _pieces(example: Example, tokenizer: Any):
    """(text, trained) of each smallest group of tokens that is a whole number of characters."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context, group = [], []
    for i, token in enumerate(example.tokens.tolist()):
        group.append(token)
        text = decode(context + group)
        if text.endswith("\ufffd") and i + 1 < len(example.tokens):
            continue
        yield text[len(decode(context)) :], bool(example.loss_mask[i])
        context, group = group, []
