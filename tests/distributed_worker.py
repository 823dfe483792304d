"""One of several processes, started by test_distributed.py; trains a list of runs one by one.

    python -m tests.distributed_worker RUNS.json NUM_PROCESSES PROCESS_ID

The environment names the coordinator. A run is the overrides of a config file, and may say which
process gets SIGTERM when the metrics of which step are due. How a run ended is printed as JSON.
"""

import json
import os
import signal
import sys

import jax

from llmzoo_jax import config, distributed, metrics, train


def main() -> None:
    path, count, number = sys.argv[1:]
    with distributed.joined(None, int(count), int(number)):
        assert (jax.process_count(), jax.process_index()) == (int(count), int(number))
        with open(path, encoding="utf-8") as file:
            runs = json.load(file)
        metrics.plot = lambda *args, **kwargs: None  # a second a run
        write = metrics.MetricsLog.write
        for run in runs:
            metrics.MetricsLog.write = signalled(write, run, int(number))
            try:
                train.train(config.load(run["config"], run["overrides"]))
                code = None
            except SystemExit as stopped:
                code = stopped.code
            print(json.dumps({"exit": code}), flush=True)


def signalled(write, run: dict, process: int):
    def write_and_signal(self, at, **values):
        write(self, at, **values)
        if [process, at] == run.get("signal") and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    return write_and_signal


if __name__ == "__main__":
    main()
