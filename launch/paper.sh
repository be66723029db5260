#!/usr/bin/env bash
# Make the table of the paper's comparison anew, in the background of other work:
#   nohup nice -n 10 bash launch/paper.sh DATA OUT >> paper.log 2>&1 &
# The same line resumes where it was stopped and repeats nothing; `kill PID` saves first. Rows
# (SET/NAME) may follow OUT; without any, all are made. OUT/table.md is written after each row.
#
# DATA holds paper_like/ (the images and table.csv: path, label, patient) and, for some rows,
#   nih14/ (as ChestX-ray14: Data_Entry_2017_v2020.csv, images/), adult_normal/ (images/ and
#   table.csv: path, patient, age, sex, view, nih_labels) and covid3/ (COVID-19, Pneumonia, Normal).
# OUT/SET/shards-K and OUT/SET/NAME-K are the shards and the runs of draw K, the seed of both.
#   paper   60 images of each class for test, the rest 80/20 for training and validation
#   adults  the same of COVID-19, pneumonia and normal, of adults only
#   covid3  70/10/20 by patient
# NAME is thumbnails (logistic regression and perceptron), a network of the recipe compare,
# densenet121 (the recipe scratch at 64 px, which is the run densenet121-64px, and from there at
# 128 px), densenet121-findings (the recipe finetune, after 14 labels of nih14 and adult_normal),
# bassi2020 (the paper's stages after the same 14 labels, in small), words (of paper/densenet121:
# text on the test images, needs cxrdist[text]).
# BatchNorm's statistics are those of each rank alone, since on CPUs it would wait for the other
# ranks most of the time.
# Environment: DRAWS ("0 1 2 3 4" if not given), and RANKS and PRECISION of launch/local.sh.
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1/paper_like/table.csv" ]; then
    echo "paper.sh: expected DATA, with paper_like/table.csv in it, and OUT; see the head of this file" >&2
    exit 2
fi
data=$1 out=$2 launch=$(dirname "${BASH_SOURCE[0]}")
rows=("${@:3}")
[ ${#rows[@]} -gt 0 ] || rows=(
    paper/thumbnails adults/thumbnails covid3/thumbnails
    paper/squeezenet1_1 paper/resnet18 paper/alexnet paper/densenet121 covid3/densenet121
    adults/densenet121 paper/densenet121-findings paper/bassi2020 paper/densenet201 paper/words
)

# A signal is passed on to the command, which saves, and then ends this shell too.
child='' signal='' stop=''
trap 'signal=yes stop=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
run() { # COMMAND [OPTIONS]
    local code=0
    [ -z "$stop" ] || exit 75
    "$@" &
    child=$! signal=yes
    while [ "$signal" ]; do # a trap ends a wait, not what is waited for
        signal='' code=0
        wait "$child" || code=$?
    done
    child=''
    [ "$code" -eq 0 ] || exit "$code"
}

pack() { # SET DRAW [SIZE]
    local shards=$out/$1/shards-${3:+$3px-}$2 options=(--source several --input "$out/$1/sources.yaml")
    [ -f "$shards/index.json" ] && return
    case $1 in
        paper) options=(--source csv --input "$data/paper_like/table.csv" --split paper) ;;
        adults) options+=(--split paper) ;;
        covid3) options=(--source csv --input "$out/covid3/table.csv") ;;
    esac
    [ "$1" = paper ] || run python "$launch/paper/sources.py" "$1" "$data" "$out/$1"
    # NIH's and Kermany's images are stretched to squares already: cut at the sides, the others
    # alone would keep their proportions, which tells the class.
    run cxrdist pack "${options[@]}" --size "${3:-128}" --fit stretch --seed "$2" --out "$shards"
}

thumbnails() { # SET DRAW
    [ -f "$out/$1/perceptron-$2/thumbnails.json" ] ||
        run python "$launch/paper/thumbnails.py" "$out/$1/shards-$2" "$out/$1" --seed "$2" --cache "$out/cache"
}

train() { # RUN SHARDS DRAW [OPTIONS]: train a run and evaluate it
    [ -f "$1/model/model.json" ] ||
        run bash "$launch/local.sh" train --run "$1" --shards "$2" --cache "$out/cache" \
            --seed "$3" --batch-norm per_rank "${@:4}"
    evaluate "$1" "$2"
}

# From random weights, at half the size first, where an epoch takes a quarter of the time. covid3 has
# a third of the images: three times the epochs.
densenet121() { # SET DRAW
    local small=$out/$1/densenet121-64px-$2 epochs=30 epochs_128=14
    [ "$1" != covid3 ] || epochs=90 epochs_128=42
    pack "$1" "$2" 64
    train "$small" "$out/$1/shards-64px-$2" "$2" --config scratch \
        --stages.all.epochs "$epochs" --stages.all.patience "$epochs"
    train "$out/$1/densenet121-$2" "$out/$1/shards-$2" "$2" --config scratch --init "$small" --stages "
        all: {lr: {all: 5.0e-4}, weight_decay: 0.05, schedule: cosine, warmup_epochs: 1,
            epochs: $epochs_128, patience: $epochs_128}"
}

evaluate() { # RUN SHARDS
    [ -f "$1/test/metrics.json" ] ||
        run bash "$launch/local.sh" evaluate --run "$1" --shards "$2" --cache "$out/cache"
}

findings() { # train on 14 labels; sets `init`
    init=$out/findings/densenet121-0
    pack findings 0
    train "$init" "$out/findings/shards-0" 0 --config scratch --stages.all.epochs 12
}

# The paper's stages in small. At such low rates SGD moves the weights by rate times steps, so with
# an eighth of the copies the first stage has 8 times the paper's rate (section 3.3), and with an
# eighth of the epochs as well, the others have 64 times. Its 72 and 8 copies can be crossed, 3 not.
bassi2020() { # SHARDS DRAW
    local run=$out/paper/bassi2020-$2 stage stages='
        head: {lr: {head: 8.0e-3}, epochs: 10, patience: 5, weight_decay: 0.01}
        unfreeze: {lr: {stem: 1.92e-6, denseblock1: 6.4e-6, denseblock2: 1.92e-5,
            denseblock3: 6.4e-5, denseblock4: 1.92e-4, head: 6.4e-4},
            epochs: 12, patience: 3, weight_decay: 0.01}
        no_decay: {lr: {stem: 1.92e-7, denseblock1: 6.4e-7, denseblock2: 1.92e-6,
            denseblock3: 6.4e-6, denseblock4: 1.92e-5, head: 6.4e-5}, epochs: 6, patience: 3}
        all_equal: {lr: {stem: 6.4e-4, denseblock1: 6.4e-4, denseblock2: 6.4e-4,
            denseblock3: 6.4e-4, denseblock4: 6.4e-4, head: 6.4e-4}, epochs: 6, patience: 3}'
    findings
    train "$run" "$1" "$2" --config bassi2020 --init "$init" --stages "$stages" \
        --copies '{COVID-19: 3, Normal: 1, Viral Pneumonia: 1}' --augmentation.draws free
    for stage in head unfreeze no_decay; do # the paper quotes test accuracy between stages
        evaluate "$run/stages/$stage" "$1"
    done
}

# The word experiments (sections 2.2 and 4.1): text of the test images as it is and covered, a word
# pasted, and the relevance on text.
words() { # SHARDS DRAW
    local folder=$out/paper/words-$2 edited=$out/paper/edited-$2 run=$out/paper/densenet121-$2
    [ -f "$run/model/model.json" ] || { echo "paper/words: needs the row paper/densenet121 first" >&2 && exit 2; }
    if [ ! -f "$folder/boxes.csv" ]; then
        run python "$launch/paper/sources.py" words "$data" "$folder"
        run cxrdist find-text --source csv --input "$folder/table.csv" --out "$folder/boxes.csv"
    fi
    [ -f "$edited/index.json" ] ||
        run cxrdist pack --source csv --input "$data/paper_like/table.csv" --split paper --size 128 \
            --fit stretch --seed "$2" --text-boxes "$folder/boxes.csv" --cover-split test --out "$edited"
    local where=(--run "$run" --cache "$out/cache")
    [ -f "$run/external/edited/metrics.json" ] ||
        run cxrdist evaluate "${where[@]}" --shards "$edited" --name edited
    [ -f "$run/test/text.json" ] ||
        run cxrdist probe-text "${where[@]}" --shards "$1" --boxes "$folder/boxes.csv"
}

needs() { # ROW: the folders of DATA that it needs beside paper_like
    case $1 in
        adults/*) echo nih14 adult_normal covid3 ;;
        covid3/*) echo covid3 ;;
        paper/densenet121-findings | paper/bassi2020) echo nih14 adult_normal ;;
        paper/*) ;;
        *) echo "paper.sh: $1: no such row; see the head of launch/paper.sh" >&2 && return 2 ;;
    esac
}

main() {
    local row folder folders set name draw shards
    for row in "${rows[@]}"; do
        folders=$(needs "$row")
        for folder in $folders; do
            [ -d "$data/$folder" ] || { echo "paper.sh: $row: not run, $data has no $folder" && continue 2; }
        done
        set=${row%%/*} name=${row#*/}
        for draw in ${DRAWS:-0 1 2 3 4}; do
            shards=$out/$set/shards-$draw
            pack "$set" "$draw"
            case $row in
                */thumbnails) thumbnails "$set" "$draw" ;;
                */densenet121) densenet121 "$set" "$draw" ;;
                paper/densenet121-findings)
                    findings
                    train "$out/$row-$draw" "$shards" "$draw" --config finetune --init "$init"
                    ;;
                paper/bassi2020) bassi2020 "$shards" "$draw" ;;
                paper/words) words "$shards" "$draw" ;;
                *) train "$out/$row-$draw" "$shards" "$draw" --config compare --network.architecture "$name" ;;
            esac
        done
        run python "$launch/paper/table.py" "$out"
    done
    exit # bash reads a script while it runs: hours later this line may be another one
}

main
