"""The flags that training and its plan share: which run, and on what."""

from __future__ import annotations

from absl import flags

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, e.g. configs/quickstart.py:phoenix. Any key of it can be set as "
    "--config.KEY=VALUE.",
    required=True,
)
HARDWARE = flags.DEFINE_string(
    "hardware",
    "",
    "What the config runs on, e.g. configs/hardware/tpu.py:v5e-256: mesh, memory, XLA's flags.",
)
