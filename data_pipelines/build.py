"""Build training and held-out files from raw data.

    python -m data_pipelines.build --recipe=real --shared=../shared/data --out=cache/real

reads every source of the recipe, cleans it, and writes to --out, for each source,
NAME.train.jsonl and NAME.heldout.jsonl (the files that a training config names), and
dropped.jsonl: one line for each record that was dropped or trimmed, with where, reason and detail.
Running it again writes the same files again.

Which side a conversation is on depends on its text alone; of exact duplicates, in any of the
sources, the first is kept.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from absl import flags

from data_pipelines.sources import Dropped, alpaca, messages, sharegpt, xpersona, zh_or_en
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, ConversationError, check_messages, write_jsonl
from llmzoo_jax.errors import InputError

# Text that no conversation may contain, and the reason that is counted. The first would forge turns
# (tokenizer.encode refuses it), the others are to be filled in by whoever names the model.
UNWANTED = {
    "<s>": "special token",
    "</s>": "special token",
    "<unk>": "special token",
    "<pad>": "special token",
    "{{name}}": "placeholder",
    "{{author}}": "placeholder",
}


@dataclass(frozen=True)
class RawSource:
    """A row of a recipe: files of one format, and what is true of all their conversations."""

    name: str  # of the files that are written
    read: Callable[..., Iterator[Conversation | Dropped]]  # conversations() of a module in sources
    files: str  # pattern below --shared
    about: dict[str, object]  # lang (where the format does not know it), kind, source, license


def _row(name, read, files, *, source, license, kind, **about) -> RawSource:
    return RawSource(name, read, files, dict(source=source, license=license, kind=kind, **about))


_FACTORY = "github.com/hiyouga/LLaMA-Factory@ff6d4d1"
_ALPACA = "Apache-2.0 (upstream: alpaca-gpt4 CC BY-NC 4.0)"

RECIPES: dict[str, tuple[RawSource, ...]] = {
    # The licences are those of SOURCE.txt in each folder.
    "real": (
        _row(
            "sharegpt_zh",
            sharegpt.conversations,
            "sharegpt-zh-1k/data/sft/sharegpt_zh_1K_format.jsonl",
            lang="zh",
            kind="conversation",
            source="github.com/shibing624/MedicalGPT@2f1008c",
            license="Apache-2.0 (upstream: user-shared ShareGPT conversations)",
        ),
        _row(
            "alpaca_en",
            alpaca.conversations,
            "llama-factory/data/alpaca_en_demo.json",
            lang="en",
            kind="language_specific_instruction",
            source=_FACTORY,
            license=_ALPACA,
        ),
        _row(
            "alpaca_zh",
            alpaca.conversations,
            "llama-factory/data/alpaca_zh_demo.json",
            lang="zh",
            kind="language_specific_instruction",
            source=_FACTORY,
            license=_ALPACA,
        ),
        _row(
            "identity",
            alpaca.conversations,
            "llama-factory/data/identity.json",
            lang=zh_or_en,
            kind="language_specific_instruction",
            source=_FACTORY,
            license="Apache-2.0",
        ),
        _row(
            "v1_sft",
            messages.conversations,
            "llama-factory/data/v1_sft_demo.jsonl",
            lang=zh_or_en,
            kind="language_specific_instruction",
            source=_FACTORY,
            license="Apache-2.0",
        ),
        _row(
            "glaive_en",
            sharegpt.conversations,
            "llama-factory/data/glaive_toolcall_en_demo.json",
            lang="en",
            kind="conversation",
            source=_FACTORY,
            license="Apache-2.0 (upstream: glaive)",
        ),
        _row(
            "glaive_zh",
            sharegpt.conversations,
            "llama-factory/data/glaive_toolcall_zh_demo.json",
            lang="zh",
            kind="conversation",
            source=_FACTORY,
            license="Apache-2.0 (upstream: glaive)",
        ),
        _row(
            "dpo_zh",
            sharegpt.conversations,
            "llama-factory/data/dpo_zh_demo.json",
            lang="zh",
            kind="conversation",
            source=_FACTORY,
            license="Apache-2.0 (upstream: DPO mix)",
        ),
        _row(
            "xpersona",
            xpersona.conversations,
            "xpersona/dataset/*_persona_*.json",
            kind="conversation",
            source="github.com/HLTCHKUST/Xpersona@1da049a",
            license="MIT",
        ),
        _row(
            "fastchat_dummy",
            sharegpt.conversations,
            "fastchat/data/dummy_conversation.json",
            lang="en",
            kind="conversation",
            source="github.com/lm-sys/FastChat@0e6d3e4",
            license="Apache-2.0",
        ),
    ),
}


# --- cleaning -----------------------------------------------------------------------------------


def clean(conversation: Conversation) -> tuple[Conversation | None, Dropped | None]:
    """What is kept of a conversation, and what is said of the rest of it.

    A conversation is kept up to its first empty turn, and up to its last answer. It is dropped
    where nothing is left, or its text or the order of its turns cannot be trained on.
    """
    turns = conversation.messages
    if turns and turns[0].role == "system" and not turns[0].content.strip():
        turns = turns[1:]
    end = next((i for i, m in enumerate(turns) if not m.content.strip()), len(turns))
    why = "empty turn" if end < len(turns) else "no answer"
    while end and turns[end - 1].role != "assistant":
        end -= 1
    kept = dataclasses.replace(conversation, messages=turns[:end])
    if not end:
        return None, Dropped(conversation.id, why, f"of {len(turns)} turns none is left")
    for number, message in enumerate(kept.messages, 1):
        for text, reason in UNWANTED.items():
            if text in message.content:
                return None, Dropped(conversation.id, reason, f"{text} in turn {number}")
    try:
        check_messages(kept.messages)
    except ConversationError as error:
        return None, Dropped(conversation.id, "malformed", str(error))
    if end == len(turns):
        return kept, None
    return kept, Dropped(conversation.id, "trimmed", f"{why}: {end} of {len(turns)} turns kept")


def content_hash(conversation: Conversation) -> bytes:
    """32 bytes that are equal for conversations of the same roles and texts."""
    turns = [(message.role, message.content) for message in conversation.messages]
    return hashlib.sha256(json.dumps(turns).encode()).digest()


def is_heldout(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --- building -----------------------------------------------------------------------------------


@dataclass
class Built:
    """What became of a source; every record that was read is in train, heldout or dropped."""

    name: str
    read: int = 0
    trimmed: int = 0
    train: list[Conversation] = field(default_factory=list)
    heldout: list[Conversation] = field(default_factory=list)
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)  # by reason
    notes: list[Dropped] = field(default_factory=list)

    def languages(self) -> collections.Counter[str]:
        return collections.Counter(c.lang for c in self.train + self.heldout)


def build_source(row: RawSource, files: list[str], seen: dict[bytes, str], share: float) -> Built:
    """Reads and cleans a source. ``seen`` is content hash -> id, over all sources."""
    built = Built(row.name)
    for item in (item for file in files for item in row.read(file, **row.about)):
        built.read += 1
        kept, note = (None, item) if isinstance(item, Dropped) else clean(item)
        if kept:
            digest = content_hash(kept)
            if digest in seen:
                kept, note = None, Dropped(kept.id, "duplicate", f"of {seen[digest]}")
        if note:
            built.notes.append(note)
        if not kept:
            built.dropped[note.reason] += 1
            continue
        seen[digest] = kept.id
        built.trimmed += note is not None
        (built.heldout if is_heldout(digest, share) else built.train).append(kept)
    return built


def build(rows: tuple[RawSource, ...], *, shared: str, out: str, heldout: float) -> list[Built]:
    """Builds all sources and writes their files. Raises InputError where a file is missing."""
    if not 0 <= heldout < 1:
        raise InputError(f"--heldout={heldout}: it is a share from 0 to 1, such as 0.1")
    files = {row.name: sorted(glob.glob(row.files, root_dir=shared)) for row in rows}
    if missing := [row.files for row in rows if not files[row.name]]:
        what = "no such folder" if not os.path.isdir(shared) else f"it has no {missing[0]}"
        raise InputError(
            f"--shared={shared}: {what}; give the folder that has the raw data, in "
            f"{', '.join(sorted({pattern.split('/')[0] for pattern in missing}))}"
        )
    seen: dict[bytes, str] = {}
    result = []
    for row in rows:
        paths = [os.path.join(shared, file) for file in files[row.name]]
        result.append(build_source(row, paths, seen, heldout))
    os.makedirs(out, exist_ok=True)
    for built in result:
        for side in ("train", "heldout"):
            path = os.path.join(out, f"{built.name}.{side}.jsonl")
            if conversations := getattr(built, side):
                write_jsonl(path, conversations)
            elif os.path.exists(path):  # of an earlier run; a file without a conversation is none
                os.remove(path)
    notes = [dataclasses.asdict(note) for built in result for note in built.notes]
    path = os.path.join(out, "dropped.jsonl")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)
    os.replace(f"{path}.tmp", path)
    return result


def table(result: list[Built]) -> str:
    """A line a source, and their sum."""
    head = ("source", "read", "kept", "trimmed", "train", "heldout", "languages", "dropped")
    lines = [head]
    total = Built("all")
    for built in result:
        lines.append(_line(built))
        total.read += built.read
        total.trimmed += built.trimmed
        total.train += built.train
        total.heldout += built.heldout
        total.dropped += built.dropped
    lines.append(_line(total))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(built: Built) -> tuple[str, ...]:
    train, heldout = len(built.train), len(built.heldout)
    numbers = (built.read, train + heldout, built.trimmed, train, heldout)
    return (built.name, *(f"{n:,}" for n in numbers), _counts(built.languages()),
            _counts(built.dropped) or "-")  # fmt: skip


def _counts(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counter.most_common())


def main(_: list[str]) -> None:
    args = flags.FLAGS
    result = build(RECIPES[args.recipe], shared=args.shared, out=args.out, heldout=args.heldout)
    print(table(result))
    print(f"\nwritten to {args.out}; every drop and trim, with its reason, is in dropped.jsonl")


if __name__ == "__main__":
    flags.DEFINE_enum("recipe", "real", sorted(RECIPES), "which list of sources to build")
    flags.DEFINE_string("shared", "../shared/data", "folder with the raw data, a folder a dataset")
    flags.DEFINE_string("out", "cache/real", "folder to write to")
    flags.DEFINE_float("heldout", 0.1, "share of the conversations that is held out")
    cli.run(main)
