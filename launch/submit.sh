#!/usr/bin/env bash
# The whole way as SLURM jobs that wait for each other: pack (an array, and a job that joins its
# parts) -> train -> evaluate -> explain -> report.
#   bash launch/submit.sh SHARDS RUN \
#       --pack --config chestxray14 --input /data/ChestX-ray14 \
#       --train --config bassi2020 --init CHEXNET.pth.tar \
#       --explain --limit 300
# What follows --pack, --train, --evaluate and --explain are options of that command; without --pack
# the shards are there already. Submit from the checkout; all nodes see it, SHARDS and RUN.
# The same line again, once the jobs have ended, does what is missing.
# Environment: PARTS (tasks of the array; 16 if not given), CXRDIST_ENV (launch/environment.sh).
set -euo pipefail
usage() {
    echo "submit.sh: $1; in the checkout: bash launch/submit.sh SHARDS RUN [--pack OPTIONS] --train OPTIONS" >&2
    exit 2
}
[ -f launch/train.sbatch ] || usage "no launch/train.sbatch here"
[ $# -ge 2 ] && [ "${1#-}${2#-}" = "$1$2" ] || usage "expected SHARDS and RUN first"
# shellcheck source=launch/environment.sh
source "${CXRDIST_ENV:-launch/environment.sh}"
shards=$1 run=$2 pack=() train=() evaluate=() explain=()
for word in "${@:3}"; do
    case $word in
        --pack | --train | --evaluate | --explain) declare -n options=${word#--} ;;
        *)
            [ -R options ] || usage "$word: --pack, --train, --evaluate or --explain comes before it"
            options+=("$word")
            ;;
    esac
done

after=()
submit() { # NAME [SBATCH OPTIONS] SCRIPT [OPTIONS]: a job that starts when the last one has succeeded
    local job
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "${@:2}")
    after=("--dependency=afterok:${job%%;*}") # where there are several clusters: JOB;CLUSTER
    echo "job ${job%%;*}: $1"
}
if [ ${#pack[@]} -gt 0 ]; then
    pack=(shards/pack.sbatch --out "$shards" "${pack[@]}")
    submit "pack, ${PARTS:=16} tasks" "${cpu_options[@]}" "--array=0-$((PARTS - 1))" "${pack[@]}"
    submit "pack, join" "${cpu_options[@]}" "${pack[@]}" --merge
fi
where=(--run "$run" --shards "$shards")
submit train "${gpu_options[@]}" launch/train.sbatch "${where[@]}" "${train[@]}"
submit evaluate "${gpu_options[@]}" launch/evaluate.sbatch "${where[@]}" "${evaluate[@]}"
submit explain "${gpu_options[@]}" launch/explain.sbatch "${where[@]}" "${explain[@]}"
submit report "${cpu_options[@]}" launch/report.sbatch --run "$run"
