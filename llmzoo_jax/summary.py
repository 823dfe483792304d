"""What a run says of its steps: the record of metrics.jsonl, a line, and which were skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmzoo_jax.config import OptimConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.metrics import say
from llmzoo_jax.step import Metrics


class TrainingError(InputError):
    """Training can't go on; the message says at which step and what to do."""


def summarise(
    pending: Sequence[Metrics], slots: int, seconds: float, languages: Sequence[str]
) -> dict[str, Any]:
    """The metrics of the steps since the last line, as NumPy, means weighted by loss tokens;
    ``slots`` are the positions of a batch. Skipped steps are counted and left out; where none is
    left, there is no loss and no norm."""
    taken = [one for one in pending if not one.skipped_in_a_row]
    tokens = float(sum(one.tokens for one in pending))
    record = {
        "tokens_per_s": tokens / seconds,
        "loss_tokens_per_s": float(sum(one.loss_tokens for one in taken)) / seconds,
        "packing": tokens / (slots * len(pending)),
        "skipped": int(pending[-1].skipped),
    }
    if not taken:
        return record
    each = jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *taken)
    mean = float((each.loss * each.loss_tokens).sum() / max(each.loss_tokens.sum(), 1))
    record = {"loss": mean, "grad_norm": float(each.grad_norm[-1]), **record}
    if each.by_language is not None:
        sums = zip(languages, each.by_language.sum(0).tolist(), strict=True)
        record["loss_by_language"] = {name: loss / count for name, (loss, count) in sums if count}
    return record


def check_skipped(pending: Sequence[Metrics], last: int, config: OptimConfig) -> None:
    """Says which of the steps up to ``last`` were skipped. Raises TrainingError where there were
    more in a row than may be."""
    for step, one in enumerate(pending, last - len(pending) + 1):
        if not one.skipped_in_a_row:
            continue
        finite = np.isfinite(one.loss) and np.isfinite(one.grad_norm)
        why = f"over {config.spike_factor} x the median" if finite else "not finite"
        what = f"loss {one.loss:.4g}, gradient norm {one.grad_norm:.4g}: {why}"
        if one.skipped_in_a_row > config.max_skipped:
            first = step - int(one.skipped_in_a_row) + 1
            raise TrainingError(
                f"steps {first} to {step} were skipped, more in a row than optim.max_skipped "
                f"({config.max_skipped}); step {step}: {what}. The weights are still those of step "
                f"{first - 1}. Lower optim.learning_rate or set optim.clip_norm in a new run "
                "folder, or raise optim.max_skipped and run again"
            )
        say(f"step {step} was skipped: {what}")


def describe(record: dict[str, Any]) -> str:
    return (
        f"loss {record.get('loss', math.nan):.4f}  grad norm "
        f"{record.get('grad_norm', math.nan):.2f}  lr {record['learning_rate']:.2e}  "
        f"{record['tokens_per_s']:,.0f} tok/s  packing {record['packing']:.1%}"
        + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")
        + f"  goodput {record['goodput']:.1%}"
        + (f"  skipped {record['skipped']}" if record["skipped"] else "")
    )
