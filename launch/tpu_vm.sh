#!/usr/bin/env bash
# Trains on a Cloud TPU slice, on all of its hosts:
#   export NAME=my-tpu ZONE=us-west4-a TYPE=v5litepod-16
#   bash launch/tpu_vm.sh create            asks first: a slice costs money until it is deleted
#   bash launch/tpu_vm.sh setup             this checkout (what git has committed) and its packages
#   bash launch/tpu_vm.sh run --config=... --hardware=configs/hardware/tpu.py:v5e-16
#   bash launch/tpu_vm.sh stop              all hosts save at the same step and stop
#   bash launch/tpu_vm.sh delete            asks first
# DRY_RUN=1 prints the commands instead. YES=1 does not ask. SPOT=1 takes a slice that may be taken
# back. PROJECT and VERSION (of the software) are gcloud's. NFS=IP:/SHARE mounts a Filestore share as
# ~/shared: data, cache and run_dir have to be where all hosts see them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${NAME:?set NAME, of the slice}" "${ZONE:?set ZONE, e.g. us-west4-a}"
PLACE=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then PLACE+=("--project=$PROJECT"); fi

call() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

confirm() {
  if [ -n "${YES:-}${DRY_RUN:-}" ]; then return; fi
  local answer
  read -r -p "$1 Type the name of the slice to go on: " answer
  if [ "$answer" != "$NAME" ]; then
    echo "nothing was done" >&2
    exit 1
  fi
}

everywhere() { call gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all --command="$1"; }

create() {
  : "${TYPE:?set TYPE, e.g. v5litepod-16}"
  local version
  case $TYPE in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=${VERSION:?set VERSION, the software of a $TYPE} ;;
  esac
  confirm "A $TYPE in $ZONE costs money from now until it is deleted."
  call gcloud compute tpus tpu-vm create "$NAME" "${PLACE[@]}" --accelerator-type="$TYPE" \
    --version="${VERSION:-$version}" ${SPOT:+--spot}
}

setup() {
  local archive
  archive=$(mktemp -d)/llmzoo_jax.tar.gz
  call git archive --prefix=llmzoo_jax/ --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$NAME:llmzoo_jax.tar.gz" "${PLACE[@]}" --worker=all
  everywhere "set -e; tar xzf llmzoo_jax.tar.gz; cd llmzoo_jax; \
command -v python3.11 || (sudo apt-get update -q && sudo apt-get install -q -y python3.11-venv); \
python3.11 -m venv .venv; .venv/bin/pip install --quiet -e '.[tpu]'"
  if [ -n "${NFS:-}" ]; then
    everywhere "set -e; sudo apt-get install -q -y nfs-common; mkdir -p shared; \
mountpoint -q shared || sudo mount -t nfs $NFS shared"
  fi
}

run() { # each host finds the others by asking Google Cloud
  local flags
  flags=$(printf '%q ' --coordinator=auto "$@")
  everywhere "cd llmzoo_jax && .venv/bin/python -m llmzoo_jax.train $flags"
}

stop() { everywhere "pkill -TERM -f 'python -m llmzoo_jax[.]train'"; }

delete() {
  confirm "$NAME and what is only on its disks will be gone."
  call gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet
}

case ${1:-} in
  create | setup | run | stop | delete) "$@" ;;
  *)
    echo "usage: bash launch/tpu_vm.sh create | setup | run FLAGS | stop | delete" >&2
    exit 2
    ;;
esac
