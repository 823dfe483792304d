#!/usr/bin/env bash
# Trains on nodes of a Slurm cluster, one process a node, with all of its GPUs:
#   sbatch --nodes=4 launch/slurm.sh --config=configs/phoenix_7b.py \
#     --hardware=configs/hardware/gpu.py:h100-8x4
# From the root of the checkout, with the virtual environment in .venv (or VENV), on a disk that all
# nodes share; run_dir must be there too. Two minutes before the time limit all processes get SIGTERM,
# save at the same step and exit with 0; the same command goes on from there. Options of sbatch
# (--partition, --time, --ntasks-per-node=8 for a process a GPU) go before launch/slurm.sh.
#SBATCH --job-name=llmzoo_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
VENV=${VENV:-.venv}
if [ -z "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; fi

# JAX finds coordinator, number and count in the variables that srun sets for each process.
exec srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m llmzoo_jax.train "$@"
