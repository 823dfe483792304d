# shellcheck shell=bash
# Shared by the scripts in this folder: the virtual environment and the timed stages.
# Source it; it changes into the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
STARTED=$SECONDS
STAGE_TIMES=""

# stage "what it does" command...: prints what runs and how long it took.
stage() {
  local title=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$title"
  "$@"
  local line
  line=$(printf '%5d s  %s' $((SECONDS - start)) "$title")
  STAGE_TIMES+="$line"$'\n'
  printf -- '--- %s\n' "$line"
}

report_times() {
  printf '\nTimes:\n%s%5d s  in all\n' "$STAGE_TIMES" $((SECONDS - STARTED))
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 found; install one, or set PYTHON=/path/to/python3" >&2
  return 1
}

# install EXTRAS: makes or reuses $VENV and installs this checkout into it, with pip's own cache.
# A stamp with the hash of pyproject.toml makes a second run instant.
install() {
  local extras=$1 python stamp wanted
  stamp=$VENV/.installed
  wanted="$extras $(sha256sum pyproject.toml | cut -d' ' -f1)"
  if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    echo "$VENV is up to date"
  else
    if [ ! -x "$VENV/bin/python" ]; then
      python=$(find_python)
      "$python" -m venv "$VENV"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$extras"
    echo "$wanted" >> "$stamp"
    echo " ${wanted#* }" >> "$stamp" # what has extras has the plain install too
  fi
  PATH="$(cd "$VENV" && pwd)/bin:$PATH"
  export PATH
  python --version
}
