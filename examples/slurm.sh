#!/bin/bash
# Trains on several machines under Slurm: sbatch examples/slurm.sh [OPTIONS OF bigkernel train text]
#
#SBATCH --job-name=bigkernel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before the end, and when it is preempted, the run saves. The same script goes on.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Else a restart may look for processes where they were before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
  --rdzv-id "$SLURM_JOB_ID" \
  -m bigkernel train text --parallel fsdp2 --out runs/cluster --resume auto "$@"
