# Sourced by submit.sh and by every job: all that is special about a cluster. Edit it, or keep one
# elsewhere and name it in CXRDIST_ENV. launch/README.md explains each line.
# shellcheck shell=bash disable=SC2034

# For sbatch: options of the jobs on GPU nodes (train, evaluate, explain) and on CPU nodes (pack, report).
gpu_options=() # (--account=thorax --partition=gpu --nodes=2 --gpus-per-node=8)
cpu_options=() # (--account=thorax --partition=cpu)

# In a job: what `python` and cxrdist need.
# module load cuda
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# Before each command of a job: a container, or nothing.
container=() # (apptainer exec --nv --bind /data cxrdist.sif)

# Which network the ranks of several nodes talk over, where they do not find it themselves.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
