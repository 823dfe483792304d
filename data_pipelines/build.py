"""Build training and held-out files from raw data.

    python -m data_pipelines.build --recipe=real --shared=../shared/data --out=cache/real

reads every source of the recipe, cleans it, and writes to --out, for each source,

- NAME.train.jsonl and NAME.heldout.jsonl, the files that a training config names;
- NAME.questions.jsonl, the questions of benchmarks, to judge with and not to train on;

and dropped.jsonl: one line for each record that was dropped or trimmed, with where, reason and
detail. Running it again writes the same files again. Records are streamed: what is held in memory
is a hash and an id of each conversation.

--recipe is one of recipes.py, or a Python file of your own that has a RECIPE.

Which side a conversation is on depends on its text alone; of exact duplicates, in any of the
sources, the first is kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from absl import flags
from tqdm import tqdm

from data_pipelines.recipes import RECIPES as RECIPES  # re-exported
from data_pipelines.recipes import RawSource as RawSource
from data_pipelines.recipes import load_recipe
from data_pipelines.sources import Dropped, Question
from llmzoo_jax import cli
from llmzoo_jax.conversation import (
    Conversation,
    ConversationError,
    check_messages,
    read_jsonl,
    to_dict,
)
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

SIDES = ("train", "heldout", "questions")


@dataclass
class Written:
    """A file of conversations: how many, and the conversations where they are iterated over."""

    path: str
    count: int = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Conversation]:
        return read_jsonl(self.path) if self.count else iter(())


@dataclass
class Built:
    """What became of a source; every record that was read is in train, heldout, questions or
    dropped."""

    name: str
    train: Written
    heldout: Written
    questions: int = 0
    read: int = 0
    trimmed: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)  # by reason
    by_language: collections.Counter[str] = field(default_factory=collections.Counter)

    def languages(self) -> collections.Counter[str]:
        """Conversations and questions by language."""
        return self.by_language

    def numbers(self) -> tuple[int, ...]:
        """read, kept, trimmed, train, heldout, questions"""
        train, heldout = len(self.train), len(self.heldout)
        return (self.read, train + heldout, self.trimmed, train, heldout, self.questions)


@contextlib.contextmanager
def json_lines(path: str, *, empty: bool = False) -> Iterator[Callable[[dict], None]]:
    """A function that writes an object as a line of ``path``.

    The file is there, whole, where the block ends without an error, and one of an earlier run is
    gone. Without a line there is none, unless ``empty``.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    count = 0

    def write(record: dict) -> None:
        nonlocal count
        count += 1
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

    try:
        # Half of a surrogate pair, which UTF-8 does not have, becomes \udXXX, as JSON writes it.
        options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
        with open(temporary, "w", **options) as file:
            yield write
        if count or empty:
            os.replace(temporary, path)
        elif os.path.exists(path):
            os.remove(path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def build_source(
    row: RawSource,
    files: list[str],
    *,
    out: str,
    seen: dict[bytes, str],
    share: float,
    note: Callable[[dict], None],
) -> Built:
    """Reads, cleans and writes a source. ``seen`` is content hash -> id, over all sources."""
    paths = {side: os.path.join(out, f"{row.name}.{side}.jsonl") for side in SIDES}
    built = Built(row.name, Written(paths["train"]), Written(paths["heldout"]))
    items = (item for file in files for item in row.read(file, **row.about))
    with contextlib.ExitStack() as stack:
        write = {side: stack.enter_context(json_lines(path)) for side, path in paths.items()}
        for item in tqdm(items, desc=row.name, unit=" records", leave=False, disable=None):
            built.read += 1
            if isinstance(item, Question):
                if all(turn.strip() for turn in item.turns):
                    write["questions"](dataclasses.asdict(item))
                    built.questions += 1
                    built.by_language[item.lang] += 1
                    continue
                item = Dropped(item.id, "empty turn", "of a question")
            kept, dropped = (None, item) if isinstance(item, Dropped) else clean(item)
            if kept:
                digest = content_hash(kept)
                if digest in seen:
                    kept, dropped = None, Dropped(kept.id, "duplicate", f"of {seen[digest]}")
            if dropped:
                note(dataclasses.asdict(dropped))
            if not kept:
                built.dropped[dropped.reason] += 1
                continue
            seen[digest] = kept.id
            built.trimmed += dropped is not None
            built.by_language[kept.lang] += 1
            side = "heldout" if is_heldout(digest, share) else "train"
            write[side](to_dict(kept))
            getattr(built, side).count += 1
    return built


def build(rows: tuple[RawSource, ...], *, shared: str, out: str, heldout: float) -> list[Built]:
    """Builds all sources and writes their files. Raises InputError where a file is missing."""
    if not 0 <= heldout < 1:
        raise InputError(f"--heldout={heldout}: it is a share from 0 to 1, such as 0.1")
    names = collections.Counter(row.name for row in rows)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"two sources have the name {twice[0]}, and would write the same files")
    files = {row.name: _files(row, shared) for row in rows}
    if missing := [row.files for row in rows if not files[row.name]]:
        what = "no such folder" if not os.path.isdir(shared) else f"it has no {missing[0]}"
        raise InputError(
            f"--shared={shared}: {what}; give the folder that has the raw data, in "
            f"{', '.join(sorted({pattern.split('/')[0] for pattern in missing}))}"
        )
    os.makedirs(out, exist_ok=True)
    seen: dict[bytes, str] = {}
    with json_lines(os.path.join(out, "dropped.jsonl"), empty=True) as note:
        return [
            build_source(row, files[row.name], out=out, seen=seen, share=heldout, note=note)
            for row in rows
        ]


def _files(row: RawSource, shared: str) -> list[str]:
    if row.files.startswith("hub:"):
        return [row.files]
    return [os.path.join(shared, file) for file in sorted(glob.glob(row.files, root_dir=shared))]


def table(result: list[Built]) -> str:
    """A line a source, and their sum."""
    head = ("source", "read", "kept", "trimmed", "train", "heldout", "questions", "languages",
            "dropped")  # fmt: skip
    rows = [(b.name, b.numbers(), b.languages(), b.dropped) for b in result]
    numbers = tuple(map(sum, zip(*(b.numbers() for b in result), strict=True)))
    languages, dropped = (
        sum(counters, collections.Counter())
        for counters in ((b.languages() for b in result), (b.dropped for b in result))
    )
    rows.append(("all", numbers, languages, dropped))
    lines = [head]
    for name, numbers, languages, dropped in rows:
        cells = (f"{n:,}" for n in numbers)
        lines.append((name, *cells, _counts(languages), _counts(dropped)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _counts(counter: collections.Counter[str], most: int = 7) -> str:
    shown = [f"{name} {n:,}" for name, n in counter.most_common(most)]
    more = [f"{len(counter) - most} more"] if len(counter) > most else []
    return ", ".join(shown + more) or "-"


def main(_: list[str]) -> None:
    args = flags.FLAGS
    rows = load_recipe(args.recipe)
    result = build(rows, shared=args.shared, out=args.out, heldout=args.heldout)
    print(table(result))
    print(f"\nwritten to {args.out}; every drop and trim, with its reason, is in dropped.jsonl")


if __name__ == "__main__":
    flags.DEFINE_string(
        "recipe",
        "real",
        f"which list of sources to build: {', '.join(sorted(RECIPES))}; or a Python file that has"
        " a RECIPE",
    )
    flags.DEFINE_string("shared", "../shared/data", "folder with the raw data, a folder a dataset")
    flags.DEFINE_string("out", "cache/real", "folder to write to")
    flags.DEFINE_float("heldout", 0.1, "share of the conversations that is held out")
    cli.run(main)
