#!/bin/bash
# Train a preset on a Slurm cluster:   sbatch --nodes 2 docs/slurm.sh PRESET [options of `train`]
# Adapt the resources, and activate your environment below. One launcher per node; the run folder
# (runs/PRESET, or $MLNET_RUNS) and the data must be on storage that all nodes share.
#SBATCH --job-name=mlnet
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
PRESET=${1:?usage: sbatch --nodes N docs/slurm.sh PRESET}
shift

# source .venv/bin/activate

NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_NODE=${NODES%%$'\n'*} # not `| head -n 1`: under pipefail the job may die of head's early end
PROCESSES=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for another job on the same nodes
MULTI_GPU=$([ "$PROCESSES" -eq 1 ] || echo --multi_gpu) # accelerate refuses it for one process
export PRESET MAIN_NODE PROCESSES PORT MULTI_GPU

# Three minutes before the time limit: let training save, then queue again and continue there.
requeue=no
trap 'requeue=yes; kill -TERM "$step"' TERM

# SLURM_NODEID is known only on the node itself, hence the inner shell.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch $MULTI_GPU \
        --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_NODE" --main_process_port "$PORT" \
        --num_processes "$PROCESSES" \
        -m mlnet_utils train --preset "$PRESET" "$@"
' bash "$@" &
step=$!

status=0
wait "$step" || status=$?
if [ "$requeue" = yes ]; then
    wait "$step" || true # the first wait ended with the signal, not with the step
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
