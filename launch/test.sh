#!/usr/bin/env bash
# Installs the test dependencies and runs the tests:
#   bash launch/test.sh          the default tests, under 10 minutes on two cores
#   bash launch/test.sh --all    the slow ones too, the quickstart among them
# Other arguments go to pytest, e.g. bash launch/test.sh -k packing
source "$(dirname "$0")/common.sh"

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
ARGS=()
for arg in "$@"; do
  if [ "$arg" = --all ]; then ARGS+=(-m ""); else ARGS+=("$arg"); fi
done

lint() {
  ruff check .
  ruff format --check .
}

stage "Install into $VENV" install "[data,serve,ui,dev]"
stage "Lint" lint
stage "Test" python -m pytest -n auto --dist loadfile "${ARGS[@]}"
report_times
