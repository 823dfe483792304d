"""The quickstart, whole, as a newcomer runs it (minutes)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quickstart_trains_exports_scores_and_chats_with_both_models(repository, tmp_path):
    # The scripts install what they need; here they find the environment that runs this test, which
    # launch/test.sh has marked as installed, so that no network is used.
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this environment was not made by launch/test.sh")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
    # XLA_FLAGS are those of tests, whose programs are not optimised.
    inherited = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    environment["VENV"] = sys.prefix
    run = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=clone, env=environment,
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    print(run.stdout[run.stdout.find("=== Score Phoenix") :])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for name, languages in (("phoenix", 21), ("chimera", 12)):
        scores = json.loads((clone / f"runs/quickstart-{name}/scores.json").read_text())
        train, heldout = scores["files"].values()
        assert train["share"] >= 0.9
        assert heldout["share"] >= 0.6
        assert len(heldout["languages"]) == languages
    assert "model: Tokyo." in run.stdout
