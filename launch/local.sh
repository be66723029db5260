#!/usr/bin/env bash
# Run a command on all ranks of this node: one per GPU, or two CPU ranks where there is none.
#   bash launch/local.sh train --config bassi2020 --shards SHARDS --run RUN
# Environment: RANKS (number of ranks), PRECISION (no, bf16, fp16; bf16 on GPUs if not given).
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then
    ranks=${RANKS:-$gpus} precision=${PRECISION:-bf16}
else
    ranks=${RANKS:-2} precision=${PRECISION:-no}
    export ACCELERATE_USE_CPU=yes
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
fi
if [ "$ranks" -eq 1 ]; then
    exec accelerate launch --num_machines 1 --num_processes 1 --mixed_precision "$precision" \
        --dynamo_backend no -m cxrdist "$@"
fi
exec accelerate launch --config_file "$(dirname "${BASH_SOURCE[0]}")/cpu.yaml" \
    --num_processes "$ranks" --mixed_precision "$precision" --main_process_port 0 -m cxrdist "$@"
