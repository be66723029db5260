#!/usr/bin/env bash
# Run a command on all ranks of this node: one per GPU, or two CPU ranks where there is none.
#   bash launch/local.sh train --config bassi2020 --shards SHARDS --run RUN
# In a SLURM step of one task a node, the ranks of all its nodes are one group (launch/train.sbatch).
# Environment: RANKS (ranks of a node), PRECISION (no, bf16, fp16; bf16 on GPUs if not given),
# MASTER_ADDR and MASTER_PORT (where the ranks of several nodes meet).
set -euo pipefail
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
if [ "$gpus" -gt 0 ]; then
    ranks=${RANKS:-$gpus} precision=${PRECISION:-bf16}
else
    ranks=${RANKS:-2} precision=${PRECISION:-no}
    export ACCELERATE_USE_CPU=yes
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
fi
here=$(dirname "${BASH_SOURCE[0]}")
nodes=${SLURM_STEP_NUM_NODES:-1}
if [ "$nodes" -gt 1 ]; then
    first=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
    exec python -m cxrdist.launch --config_file "$here/multi_node.yaml" \
        --num_machines "$nodes" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$first" \
        --main_process_port "${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}" \
        --num_processes "$((nodes * ranks))" --mixed_precision "$precision" -m cxrdist "$@"
fi
if [ "$ranks" -eq 1 ]; then
    exec python -m cxrdist.launch --num_machines 1 --num_processes 1 --dynamo_backend no \
        --mixed_precision "$precision" -m cxrdist "$@"
fi
exec python -m cxrdist.launch --config_file "$here/cpu.yaml" \
    --num_processes "$ranks" --mixed_precision "$precision" --main_process_port 0 -m cxrdist "$@"
