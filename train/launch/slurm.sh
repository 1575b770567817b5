#!/bin/bash
# sbatch train/launch/slurm.sh RECIPE [key=value ...]
# Two machines of eight GPUs; the output folder must be on a file system that both see.
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Five minutes before the end, and before pre-emption, every task is told: it finishes its
# step, writes a checkpoint and ends with code 0. A pre-empted job is queued again by SLURM;
# after the time limit, submit the same command: it goes on.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS
# srun starts each rank itself, so that the signal reaches it and no launcher in between.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec vlm train "$@"' vlm "$@"
