#!/usr/bin/env bash
# Run a command on all ranks of this node: one per GPU, or two CPU ranks where there is none.
#   bash launch/local.sh train --config bassi2020 --shards SHARDS --run RUN
# In a SLURM step of one task per node, the ranks of all nodes are one group (launch/train.sbatch).
# Environment: RANKS (ranks of a node), PRECISION (no, bf16, fp16; bf16 on GPUs if not given),
# MASTER_ADDR and MASTER_PORT (where the ranks of several nodes meet), CUDA_VISIBLE_DEVICES (GPUs
# that this run may use; empty for CPU ranks).
set -euo pipefail

# Print how many GPUs the ranks will see. Like CUDA, take CUDA_VISIBLE_DEVICES up to the first entry
# that is not a GPU of this node; without nvidia-smi (some containers) trust what SLURM wrote there.
count_gpus() {
    local listed pattern id count=0 ids=()
    listed=$(nvidia-smi --list-gpus 2>/dev/null || true)
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "${SLURM_GPUS_ON_NODE:-$(grep -c '^GPU' <<<"$listed" || true)}"
        return
    fi
    IFS=', ' read -ra ids <<<"$CUDA_VISIBLE_DEVICES"
    for id in ${ids[@]+"${ids[@]}"}; do
        case $id in
            GPU-* | MIG-*) pattern="(UUID: $id" ;;
            '' | *[!0-9]*) break ;;
            *) pattern="GPU $id: " ;;
        esac
        [[ $listed == *"$pattern"* || (-z $listed && -n ${SLURM_GPUS_ON_NODE:-}) ]] || break
        count=$((count + 1))
    done
    echo "$count"
}

gpus=$(count_gpus)
if [ "$gpus" -gt 0 ]; then
    ranks=${RANKS:-$gpus} precision=${PRECISION:-bf16}
else
    ranks=${RANKS:-2} precision=${PRECISION:-no}
    export ACCELERATE_USE_CPU=yes
    # accelerate launch would give each rank one thread.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
fi
here=$(dirname "${BASH_SOURCE[0]}")
nodes=${SLURM_STEP_NUM_NODES:-1}
if [ "$nodes" -gt 1 ]; then
    # All nodes derive the same port from the job, and two jobs of a node rarely share it. Linux
    # itself gives out ports from 32768 on.
    first=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
    exec python -m cxrdist.launch --config_file "$here/multi_node.yaml" \
        --num_machines "$nodes" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$first" \
        --main_process_port "${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}" \
        --num_processes "$((nodes * ranks))" --mixed_precision "$precision" -m cxrdist "$@"
fi
# The configs have distributed_type MULTI_GPU, for which accelerate requires two ranks or more.
if [ "$ranks" -eq 1 ]; then
    exec python -m cxrdist.launch --num_machines 1 --num_processes 1 --dynamo_backend no \
        --mixed_precision "$precision" -m cxrdist "$@"
fi
# These options override the ranks and precision of cpu.yaml: it suits GPUs, too. Port 0: any free.
exec python -m cxrdist.launch --config_file "$here/cpu.yaml" \
    --num_processes "$ranks" --mixed_precision "$precision" --main_process_port 0 -m cxrdist "$@"
