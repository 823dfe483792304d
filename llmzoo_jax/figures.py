"""Saving figures of matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def save(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure."""
    import matplotlib.pyplot as plt  # here: it is slow to import

    part = path.with_name(f".{path.stem}.part.png")
    figure.tight_layout()
    figure.savefig(part)
    os.replace(part, path)
    plt.close(figure)
