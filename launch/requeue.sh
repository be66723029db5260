# Sourced by train.sbatch and seeds.sbatch, first of all: run a command of cxrdist on all ranks, let
# it save when the time is nearly up or the job is preempted, and requeue the job.
# shellcheck shell=bash
# SLURM tells this shell alone that the time is nearly up (--signal=B:), and it passes that on.
signal='' stop='' step='' code=75
trap 'signal=yes stop=yes; [ -z "$step" ] || kill -USR1 "$step" || true' USR1 TERM

# usage: run_until_stopped COMMAND [OPTIONS]; exits with the code of the ranks
run_until_stopped() {
    if [ -z "$stop" ]; then
        # Since Slurm 22.05 srun does not inherit --cpus-per-task from the job.
        export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
        # --wait: once a node has ended, Slurm ends the others after 120 s.
        # shellcheck disable=SC2154 # container is that of environment.sh
        srun --wait=120 "${container[@]}" bash launch/local.sh "$@" &
        step=$! signal=yes
    fi
    while [ "$step" ] && [ "$signal" ]; do # a trap ends a wait, not what is waited for
        signal='' code=0
        wait "$step" || code=$?
    done
    # 75: stopped on request, all is saved; 138: USR1 came before the ranks could hear it. A job that
    # SLURM requeues itself, or that a user cancels, is no longer running.
    if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
        local state
        state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")
        [ "$state" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
