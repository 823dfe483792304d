"""One source of a recipe as a TFDS dataset: ArrayRecord, written and read without TensorFlow.

    python -m data_pipelines.tfds_builder --recipe=real --name=xpersona --data_dir=cache/tfds

builds the source as ``data_pipelines.build`` does, and writes its splits train and heldout. Then

    source = tfds.builder("xpersona", data_dir="cache/tfds").as_data_source(split="train")
    conversation = data_pipelines.tfds_builder.from_example(source[0])

Needs tensorflow_datasets: pip install 'llmzoo-jax[data]'. Duplicates are looked for in this source
alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.build import build
from data_pipelines.recipes import RECIPES, RawSource, load_recipe
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError

VERSION = "1.0.0"
FIELDS = ("id", "lang", "kind", "source", "license")
_TRAIN = (None, False, True)  # Message.train, as its index here


def to_example(conversation: Conversation) -> dict[str, Any]:
    """The features of a conversation; ``train`` of a message is 0 (not set), 1 (no) or 2 (yes)."""
    messages = [
        {"role": m.role, "content": m.content, "train": _TRAIN.index(m.train)}
        for m in conversation.messages
    ]
    return {field: getattr(conversation, field) for field in FIELDS} | {"messages": messages}


def from_example(example: dict[str, Any]) -> Conversation:
    """The inverse of ``to_example``, from what TFDS gives: bytes, and a list for each feature of
    the messages."""
    turns = example["messages"]
    messages = tuple(
        Message(role.decode(), content.decode(), _TRAIN[train])
        for role, content, train in zip(
            turns["role"], turns["content"], turns["train"], strict=True
        )
    )
    return Conversation(messages=messages, **{field: example[field].decode() for field in FIELDS})


def builder(row: RawSource, splits: dict[str, Iterable[Conversation]], *, data_dir: str):
    """A ``tfds.core.GeneratorBasedBuilder`` of these splits. Raises InputError without TFDS."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "this needs tensorflow_datasets; install it with: pip install 'llmzoo-jax[data]'"
        ) from error

    class Conversations(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = row.name
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            turn = {"role": text, "content": text, "train": tfds.features.Scalar(np.int32)}
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Conversations of {row.about['source']}, files {row.files}.",
                features=tfds.features.FeaturesDict(
                    dict.fromkeys(FIELDS, text) | {"messages": tfds.features.Sequence(turn)}
                ),
                homepage=f"https://{row.about['source']}",
                license=str(row.about["license"]),
            )

        def _split_generators(self, dl_manager) -> dict[str, Iterator]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for conversation in splits[split]:
                yield conversation.id, to_example(conversation)

    return Conversations(data_dir=data_dir, file_format="array_record")


def write(row: RawSource, *, shared: str, data_dir: str, heldout: float) -> Any:
    """Builds and writes a source; the TFDS builder of what is written."""
    path = os.path.join(data_dir, row.name, VERSION)
    if os.path.exists(path):
        raise InputError(f"{path} is there already; remove it, or give another --data_dir")
    with tempfile.TemporaryDirectory() as folder:
        (built,) = build((row,), shared=shared, out=folder, heldout=heldout)
        splits = {
            name: side
            for name, side in (("train", built.train), ("heldout", built.heldout))
            if len(side)
        }
        if not splits:
            raise InputError(f"{row.name} has no conversations: read {built.read}, questions"
                             f" {built.questions}, dropped {dict(built.dropped)}")  # fmt: skip
        written = builder(row, splits, data_dir=data_dir)
        written.download_and_prepare()
    return written


def main(_: list[str]) -> None:
    args = flags.FLAGS
    rows = {row.name: row for row in load_recipe(args.recipe)}
    if args.name not in rows:
        raise InputError(f"--name={args.name}: {args.recipe} has {', '.join(rows)}")
    written = write(
        rows[args.name], shared=args.shared, data_dir=args.data_dir, heldout=args.heldout
    )
    for name, split in written.info.splits.items():
        print(f"{name}: {split.num_examples:,} conversations")
    print(f"written to {written.data_path}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "recipe", "real", f"recipe of the source: {', '.join(sorted(RECIPES))}, or a Python file"
    )
    flags.DEFINE_string("name", None, "which source of the recipe", required=True)
    flags.DEFINE_string("shared", "../shared/data", "folder with the raw data, a folder a dataset")
    flags.DEFINE_string("data_dir", "cache/tfds", "folder of TFDS datasets to write to")
    flags.DEFINE_float("heldout", 0.1, "share of the conversations that is held out")
    cli.run(main)
