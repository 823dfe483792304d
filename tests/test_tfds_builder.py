"""A source becomes a TFDS dataset and comes back equal, without TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.recipes import RawSource
from data_pipelines.sources import messages
from llmzoo_jax.conversation import read_jsonl

pytest.importorskip("tensorflow_datasets")

REPOSITORY = Path(__file__).parents[1]
COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw data, a recipe for it, what build makes of it, and the TFDS dataset, by the commands."""
    folder = tmp_path_factory.mktemp("tfds")
    records = [
        {"messages": [
            {"role": "system", "content": f"Sei höflich. {i}"},
            {"role": "user", "content": "Wie geht's?"},
            {"role": "assistant", "content": "Gut.", "loss_weight": 0},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": f"好 {i}"},
        ][0 if i % 3 else 1:]}
        for i in range(COUNT)
    ]  # fmt: skip
    (folder / "raw").mkdir()
    (folder / "raw/chats.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "recipe.py").write_text(
        "from data_pipelines.recipes import RawSource\n"
        "from data_pipelines.sources import messages\n"
        "ABOUT = dict(lang='de', kind='conversation', source='example.org/x', license='MIT')\n"
        "RECIPE = [RawSource('small_chats', messages.conversations, 'chats.json', ABOUT)]\n",
        encoding="utf-8",
    )
    common = [f"--recipe={folder}/recipe.py", f"--shared={folder}/raw"]
    run("data_pipelines.build", *common, f"--out={folder}/built")
    shown = run("data_pipelines.tfds_builder", *common, "--name=small_chats",
                f"--data_dir={folder}/tfds")  # fmt: skip
    assert "train: " in shown
    return folder


def run(module, *args):
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_is_read_back_equal_without_tensorflow(folder):
    code = """
import sys
import tensorflow_datasets as tfds
from data_pipelines.tfds_builder import from_example
from llmzoo_jax.conversation import read_jsonl
folder = sys.argv[1]
builder = tfds.builder("small_chats", data_dir=folder + "/tfds")
assert builder.info.homepage == "https://example.org/x", builder.info.homepage
total = 0
for split in ("train", "heldout"):
    source = builder.as_data_source(split=split)
    found = sorted((from_example(source[i]) for i in range(len(source))), key=lambda c: c.id)
    assert found == sorted(read_jsonl(f"{folder}/built/small_chats.{split}.jsonl"),
                           key=lambda c: c.id)
    total += len(found)
assert "tensorflow" not in sys.modules
print(total)
"""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    kept = sum(1 for side in ("train", "heldout")
               for _ in read_jsonl(folder / f"built/small_chats.{side}.jsonl"))  # fmt: skip
    assert int(done.stdout) == kept > COUNT / 2


def test_a_dataset_that_is_there_is_not_overwritten_silently(folder):
    from data_pipelines.tfds_builder import write

    row = RawSource("small_chats", messages.conversations, "chats.json", {})
    with pytest.raises(ValueError, match=r"small_chats/1\.0\.0 is there already; remove it"):
        write(row, shared=str(folder / "raw"), data_dir=str(folder / "tfds"), heldout=0.1)
