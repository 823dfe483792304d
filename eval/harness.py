"""lm-evaluation-harness on our models: its tasks by name, and task files of one's own.

    python -m eval.harness --model=DIR --tasks=xcopa_sw,xstorycloze_ar --out=results.json
    python -m eval.harness --model=DIR --tasks=my_task --include_path=tasks --out=results.json

Its multilingual tasks (xcopa, xnli, xwinograd, xstorycloze, mgsm, belebele, global_mmlu, okapi)
load their data from the hub. Without a network, --include_path names a folder of task files (YAML)
whose data are local: ``dataset_path: json`` and ``dataset_kwargs: {data_files: {test: FILE}}``.
--apply_chat_template writes each prompt in the model's chat format.

It is an extra: pip install 'llmzoo-jax[eval]'.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from absl import flags

from eval.score import write_json
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError


@functools.cache
def task_manager(include_path: str) -> Any:
    """Reading the names of all the harness's tasks takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path or None)


def evaluate(backend: Any, tasks: list[str], *, include_path: str = "", **options: Any) -> Any:
    """``lm_eval.simple_evaluate`` with ``options``, and with tasks of ``include_path`` beside its
    own. Raises InputError for a task that there is none of."""
    import lm_eval

    manager = task_manager(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"--tasks: there is no task {', '.join(unknown)}; `lm-eval ls tasks` lists those it"
            " has, and --include_path adds your own"
        )
    return lm_eval.simple_evaluate(model=backend, tasks=tasks, task_manager=manager, **options)


def table(results: dict[str, Any]) -> str:
    lines = []
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, rest = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and rest:
                error = values.get(f"{metric}_stderr,{rest}")
                width = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task:<32}{metric:<20}{value:>10.4f}{width}")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    args = flags.FLAGS
    try:
        from eval.harness_backend import Backend
    except ImportError as error:
        raise InputError(f"{error}; install it with: pip install 'llmzoo-jax[eval]'") from error
    import llmzoo_jax
    from serving.offline import on_engine

    model = llmzoo_jax.load(args.model, dtype=args.dtype, tensor=args.tensor)
    with on_engine(model, max_batch=args.batch_size, context=args.max_length) as fast:
        backend = Backend(
            fast, batch_size=args.batch_size, max_length=args.max_length, seed=args.seed
        )
        results = evaluate(
            backend,
            args.tasks,
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            log_samples=args.log_samples,
        )
    print(table(results))
    if args.out:
        # The harness's results hold functions and arrays: what is not JSON is written as text.
        write_json(Path(args.out), json.loads(json.dumps(results, default=str)))
        print(f"written: {args.out}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or run folder", required=True)
    flags.DEFINE_list("tasks", None, "names of tasks or groups, as xcopa_sw,mgsm", required=True)
    flags.DEFINE_string("include_path", "", "folder of task files of one's own")
    flags.DEFINE_integer("num_fewshot", None, "examples in the prompt; default: the task's")
    flags.DEFINE_integer("limit", None, "documents of each task, at most", lower_bound=1)
    flags.DEFINE_bool("apply_chat_template", False, "write prompts in the chat format")
    flags.DEFINE_bool("log_samples", False, "every document and answer into --out")
    flags.DEFINE_integer("batch_size", 16, "rows computed together", lower_bound=1)
    flags.DEFINE_integer("max_length", 0, "positions; 0: the model's own", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of sampling", lower_bound=0)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to compute in")
    flags.DEFINE_integer("tensor", 1, "devices to split a model over", lower_bound=1)
    flags.DEFINE_string("out", "", "JSON file to write, if any")
    cli.run(main)
