"""The training command in a process of its own, to which something happens.

    python -m tests.faulty_train WHAT --config=...

WHAT is ``nothing`` or one of the functions below; each waits for its moment inside the run.
"""

import os
import signal
import sys

from llmzoo_jax import checkpoint, cli, metrics, train


def before(module, name: str, do, *, call: int = 1) -> None:
    """Runs ``do()`` when the function is called for the so-manieth time."""
    real, calls = getattr(module, name), []

    def patched(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            do()
        return real(*args, **kwargs)

    setattr(module, name, patched)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def fill_disk() -> None:
    with open(os.path.join(os.environ["RUN_DIR"], "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass  # that is the aim


def no_room_after_check() -> None:
    """Another program fills the disk between our look at its room and the write."""
    before(checkpoint.ocp.CheckpointManager, "save", fill_disk, call=2)


WHAT = {
    "nothing": lambda: None,
    "SIGTERM-in-compile": lambda: before(train.steps, "jit_train_step", send(signal.SIGTERM)),
    "SIGINT-in-compile": lambda: before(train.steps, "jit_train_step", send(signal.SIGINT)),
    "SIGTERM-in-evaluation": lambda: before(metrics, "by_language", send(signal.SIGTERM)),
    "SIGINT-in-evaluation": lambda: before(metrics, "by_language", send(signal.SIGINT)),
    "SIGTERM-in-save": lambda: before(checkpoint.manifest, "make", send(signal.SIGTERM), call=2),
    "SIGINT-in-save": lambda: before(checkpoint.manifest, "make", send(signal.SIGINT), call=2),
    "full-disk-in-save": no_room_after_check,
    "full-disk-in-metrics": lambda: before(metrics.MetricsLog, "write", fill_disk, call=2),
}

if __name__ == "__main__":
    WHAT[sys.argv.pop(1)]()
    argv, overrides = cli.split_overrides(sys.argv)
    cli.run(lambda _: train.main(overrides), argv)
