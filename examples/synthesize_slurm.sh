#!/bin/bash
# A million labelled images on 8 nodes:  MODEL=runs/retina OUT=$SCRATCH/retina sbatch examples/synthesize_slurm.sh
#
# MODEL is the folder of a run of kr-fast, or of a class-conditional diffusers model; MODEL and OUT lie where all nodes
# see them. The bytes do not depend on the number of nodes or GPUs. After a time-out or a crash submit the same line
# again: finished shards stay, and lost ones are made again.
#SBATCH --job-name=synthesize
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
MODEL=${MODEL:?folder of the model} OUT=${OUT:?folder of the data set} COUNT=${COUNT:-1000000}
SHARD_SIZE=${SHARD_SIZE:-4096} # about eight shards for each of the 32 GPUs
processes=${SLURM_GPUS_ON_NODE:-4}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Each node packs its GPUs' images on its own processors.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-32}
export OMP_NUM_THREADS=$(((SRUN_CPUS_PER_TASK + processes - 1) / processes))

# torchrun is what accelerate launch runs; one on each node starts a process for each GPU.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
    -m kr_fast synthesize --model "$MODEL" --out "$OUT" --count "$COUNT" --shard-size "$SHARD_SIZE" \
    --format webdataset "$@"
