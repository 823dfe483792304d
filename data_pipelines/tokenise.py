"""Tokenise the conversations of a training config before it is run, on one machine or several.

    python -m data_pipelines.tokenise --config=configs/real_cpu.py:phoenix
    python -m data_pipelines.tokenise --config=configs/phoenix_7b.py --engine=ray --address=auto

Training does the same when it starts; a pod need not wait for it. What is finished is not done
again, so a stopped command goes on where it was. With Ray, the files and ``data.cache_dir`` must be
on a file system that all machines have under the same path; the bytes that come out are the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from absl import flags

from llmzoo_jax import cli
from llmzoo_jax import config as configs
from llmzoo_jax.config import Config
from llmzoo_jax.errors import InputError
from llmzoo_jax.shards import Codec, Shard, write_shard
from llmzoo_jax.tokenise import Engine, Records, tokenise_all
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format


def tokenise_config(
    config: Config, *, workers: int | None = None, engine: Engine | None = None
) -> list[Records]:
    """The tokenised training and held-out files of ``config``, in this order."""
    data, tokenizer = config.data, load_tokenizer(config.tokenizer)
    return tokenise_all(
        [source.path for source in (*data.train, *data.heldout)],
        tokenizer=tokenizer,
        chat_format=resolve_format(config.chat_format, tokenizer),
        languages=data.languages,
        cache_dir=data.cache_dir,
        workers=workers,
        engine=engine,
    )


# --- Ray ----------------------------------------------------------------------------------------


def ray_engine(
    shards: Sequence[Shard], codec: Codec, *, workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Writes shards on the machines of the Ray cluster that is connected: an ``Engine``.

    ``workers`` are processes; None is one for each CPU of the cluster.
    """
    import ray.data

    cpus = int(ray.cluster_resources().get("CPU", 1))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one already
    context.execution_options.preserve_order = True
    rows = ray.data.from_items(list(map(asdict, shards)), override_num_blocks=len(shards))
    written = rows.map(
        _Writer,
        fn_constructor_args=(codec,),
        compute=ray.data.ActorPoolStrategy(size=min(workers or cpus, len(shards))),
    )
    for row in written.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        yield row


class _Writer:
    """One process of the cluster."""

    def __init__(self, codec: Codec):
        self.codec = codec

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            write_shard(Shard(**row), self.codec)
        except (InputError, OSError) as error:  # as text: Ray wraps what is raised
            return {"out": row["out"], "error": str(error)}
        return {"out": row["out"], "error": ""}


def connect(address: str) -> None:
    """Connects to the Ray cluster at ``address``, or starts one on this machine where it is ""."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine=ray needs Ray: pip install 'llmzoo-jax[ray]'") from error
    try:
        ray.init(address or "local", log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address={address}: no Ray cluster there: {error}") from error


# --- the command --------------------------------------------------------------------------------


def main(_: list[str], overrides: Sequence[str]) -> None:
    args = flags.FLAGS
    config = configs.load(args.config, overrides)
    engine = None
    if args.engine == "ray":
        connect(args.address)
        engine = functools.partial(ray_engine, workers=args.workers)
    elif args.address:
        raise InputError(f"--address={args.address}: it is for --engine=ray")
    for file in tokenise_config(config, workers=args.workers, engine=engine):
        print(f"{file.path}: {len(file):,} conversations, {int(file.lengths.sum()):,} tokens")
    print(f"kept in {config.data.cache_dir}")


if __name__ == "__main__":
    argv, overrides = cli.split_overrides(sys.argv)
    flags.DEFINE_string("config", None, "training config, FILE or FILE:arg", required=True)
    flags.DEFINE_enum("engine", "processes", ["processes", "ray"], "what the work is spread by")
    flags.DEFINE_string("address", "", "of a Ray cluster, or auto; empty: this machine alone")
    flags.DEFINE_integer("workers", None, "processes; by default one for each core", 1)
    cli.run(lambda argv: main(argv, overrides), argv)
