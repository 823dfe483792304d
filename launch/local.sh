#!/usr/bin/env bash
# Trains in several processes on this machine, as the hosts of a pod would:
#   bash launch/local.sh 2 --config=configs/quickstart.py:phoenix
#   DEVICES=4 bash launch/local.sh 2 --config=... --config.mesh.tensor=4   four CPU devices each
# Ctrl-C and SIGTERM go to all of them, which save and stop at the same step. Where one fails, the
# others are ended.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local.sh PROCESSES --config=... [flags of llmzoo_jax.train]" >&2
  exit 2
fi
count=$1
shift
VENV=${VENV:-.venv}
if [ -z "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; fi
PYTHON=${PYTHON:-python}

port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_NUM_CPU_DEVICES=${DEVICES:-1}
pids=()
forward() {
  signalled=1
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'forward TERM' TERM
trap 'forward INT' INT
for ((i = 0; i < count; i++)); do
  "$PYTHON" -m llmzoo_jax.train --coordinator="127.0.0.1:$port" --num_processes="$count" \
    --process_id="$i" "$@" &
  pids+=($!)
done

status=0
left=$count
while [ "$left" -gt 0 ]; do
  signalled=
  code=0
  wait -n || code=$?
  if [ -n "$signalled" ]; then continue; fi # the signal ended the wait, not a process
  if [ $code -eq 127 ]; then break; fi      # none is left
  left=$((left - 1))
  if [ $code -ne 0 ] && [ $status -eq 0 ]; then
    status=$code
    if [ $code -ne 130 ]; then forward KILL; fi # after Ctrl-C the others stop by themselves
  fi
done
exit $status
