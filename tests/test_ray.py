"""Tokenising on several machines: Ray Data writes the bytes that one process writes."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest

from data_pipelines.tokenise import ray_engine
from llmzoo_jax import tokenise as tokenise_module
from llmzoo_jax.errors import InputError
from llmzoo_jax.tokenise import tokenise_all
from llmzoo_jax.tokenizer import save_tokenizer
from tests.test_data import CODEC, conversation, write
from tests.test_tokenise import tree

ray = pytest.importorskip("ray", reason="pip install 'llmzoo-jax[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, as two machines would be."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()}
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    nodes.add_node(**node)
    ray.init(nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
def test_ray_on_two_nodes_gives_the_same_bytes_as_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise_module, "SHARD_BYTES", 1000)
    records = [conversation(f"name{i}", "en", 3 + i % 5) for i in range(40)]
    paths = [write(tmp_path / "a.jsonl", records[:30]), write(tmp_path / "b.jsonl", records[30:])]
    one = tokenise_all(paths, **CODEC, cache_dir=str(tmp_path / "one"), workers=1)
    two = tokenise_all(paths, **CODEC, cache_dir=str(tmp_path / "two"), engine=ray_engine)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) > 10
    assert [len(file) for file in one] == [len(file) for file in two] == [30, 10]

    def nothing(shards, codec):
        raise AssertionError("everything is in the cache")

    tokenise_all(paths, **CODEC, cache_dir=str(tmp_path / "two"), engine=nothing)


@pytest.mark.slow
def test_a_bad_line_is_named_and_leaves_no_cache(cluster, tmp_path):
    records = [conversation("name"), {"messages": []}]
    path = write(tmp_path / "bad.jsonl", records)
    engine = functools.partial(ray_engine, workers=1)
    with pytest.raises(InputError, match=r"bad\.jsonl:2"):
        tokenise_all([path], **CODEC, cache_dir=str(tmp_path / "cache"), engine=engine)
    assert not tree(tmp_path / "cache")


def test_the_command_fills_the_cache_of_a_config(tmp_path):
    """Without Ray; what it writes is what training looks for."""
    path = write(tmp_path / "a.jsonl", [conversation(f"name{i}") for i in range(5)])
    save_tokenizer(CODEC["tokenizer"], tmp_path / "tokenizer", chat_format=CODEC["chat_format"])
    config = tmp_path / "config.py"
    config.write_text(
        textwrap.dedent(f"""
        from llmzoo_jax.config import Config, DataConfig, Source

        def get_config():
            data = DataConfig(train=(Source(path={path!r}),), cache_dir={str(tmp_path / "cache")!r})
            return Config(run_dir="", tokenizer={str(tmp_path / "tokenizer")!r}, data=data,
                          chat_format="chatml")
        """)
    )
    command = [sys.executable, "-m", "data_pipelines.tokenise", f"--config={config}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{path}: 5 conversations, " in done.stdout
    assert len(tree(tmp_path / "cache")) == 2
    refused = subprocess.run([*command, "--address=auto"], capture_output=True, text=True)
    assert refused.returncode == 1 and "--engine=ray" in refused.stderr
