#!/usr/bin/env bash
# Data parallel on two nodes: sbatch examples/launch/slurm.sh recipe.yaml
# At the end of its time SLURM sends SIGTERM: the run finishes its step, saves and exits, and the same command with
# resume_from_checkpoint: true in the recipe goes on exactly.
#SBATCH --job-name=rankwise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
recipe=${1:?usage: sbatch examples/launch/slurm.sh recipe.yaml}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m rankwise train "$recipe"
