"""What every command shares: absl flags, errors without a traceback, exit codes."""

from __future__ import annotations

import logging as standard_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, logging

from llmzoo_jax.errors import InputError


def run(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """``absl.app.run``, with InputError and OSError (missing file, full disk) as one message."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"don't know what to do with {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().addFilter(_is_news)
        # transformers says at its import that it found no PyTorch: it is not meant to.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            main(argv)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, argv=list(argv) if argv is not None else None)


def _is_news(record: standard_logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax writes, and leaves to asyncio, of errors it raises."""
    left_over = record.name == "asyncio" and "never retrieved" in record.getMessage()
    return not left_over and "orbax" not in record.pathname


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--config.KEY=VALUE`` and ``--config.KEY VALUE`` apart from the rest:
    (other arguments, ["KEY=VALUE", ...])."""
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key = argument.removeprefix("--config.")
        overrides.append(key if "=" in key else f"{key}={next(arguments, '')}")
    return rest, overrides
