#!/usr/bin/env bash
# What is to be measured on a machine with a GPU, in pieces that fit into nine minutes a call:
#
#     bash benchmarks/gpu.sh               go on, until nothing is left
#     bash benchmarks/gpu.sh moco probe    these pieces alone
#     TINY=1 bash benchmarks/gpu.sh        a rehearsal at tiny sizes, on a CPU if there is no GPU
#
# SECONDS_A_CALL (520)   when the running piece is told to stop; it may take 20 seconds to save
# GPU_FOLDER (runs/gpu)  what is done, what each piece printed, and the runs; results.tar.gz in it
#                        holds all of this but weights, and brings it to another machine's folder;
#                        a rehearsal has runs/gpu-tiny
# DATASETS (datasets)    where cifar-10-batches-py lies
#
# The exit status is 0 if all is done, 75 if something is left, 1 if a piece failed.
set -uo pipefail
shopt -s nullglob
export PYTHONUNBUFFERED=1  # what is printed until a piece is stopped is kept
root=$(cd "$(dirname "$0")/.." && pwd)
limit=${SECONDS_A_CALL:-520}
datasets=$(realpath "${DATASETS:-$root/datasets}")
folder=${GPU_FOLDER:-$root/runs/gpu${TINY:+-tiny}}
mkdir -p "$folder" && cd "$folder" && touch done.txt failed.txt || exit 1

step=(--batch 512 --rounds 7) losses=() input=(--folder "$datasets/imagenette96/train")
kmeans=(--rounds 3) run=(data.root="$datasets")
if [ "${TINY:-}" ]; then
    step=(--batch 4 --size 16 --queue 16 --rounds 1 --backbone resnet10)
    losses=(--queries 8 --negatives 64 --rows 4096 --rounds 1)
    input=(--images 2 --rounds 1 --folder none)
    kmeans=(--small --rounds 1 --seeds 1)
    run=(data.name=shapes data.limit=128 model.backbone=resnet10 model.width=4 model.bn_splits=2
        model.queue_size=64 optim.batch_size=16 optim.epochs=3 knn.every=1 knn.limit=50
        linear.epochs=1)
fi

# Sets `command`, python's arguments for a piece.
choose_command() {
    local moco=$root/yaml/cifar10_moco_32px.yaml
    local method=$root/yaml/cifar10_moco_${1}_32px.yaml
    case $1 in
    tests) command=(-m pytest -q -o addopts= -m cuda "$root/tests/test_cuda.py") ;;
    step) command=("$root/benchmarks/step.py" "${step[@]}") ;;
    losses) command=("$root/benchmarks/losses.py" "${losses[@]}") ;;
    input) command=("$root/benchmarks/input.py" "${input[@]}") ;;
    kmeans) command=("$root/benchmarks/kmeans.py" "${kmeans[@]}") ;;
    probe) command=("$root/train_linear.py" --cfg "$moco" "${run[@]}") ;;
    moco) command=("$root/train_pretrain.py" --cfg "$moco" "${run[@]}") ;;
    ring | mochi | ifnd | jcl) command=("$root/train_pretrain.py" --cfg "$method" "${run[@]}") ;;
    *) echo "gpu.sh has no piece $1; it has ${all[*]}"; exit 2 ;;
    esac
}

all=(tests step losses input kmeans moco probe ring mochi ifnd jcl)
pieces=("$@")
[ $# -gt 0 ] || pieces=("${all[@]}")
for piece in "${pieces[@]}"; do choose_command "$piece"; done
gpu=$(python3 -c 'import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name())')
if [ "$gpu" = False ]; then
    [ "${TINY:-}" ] || { echo "there is no GPU; TINY=1 rehearses all of this on the CPU"; exit 1; }
    export TEST_DEVICE=cpu
fi

# What came out of a piece, in a line.
figure_of() {
    case $1 in
    tests) tail -n 1 "$1.log" ;;
    probe) grep -o '"figures": {[^}]*}' runs/cifar10_moco_32px/linear.jsonl | tail -n 1 ;;
    moco | ring | mochi | ifnd | jcl) grep "^epoch .*kNN" "$1.log" | tail -n 1 ;;
    *) echo "its tables are in $folder/$1.log" ;;
    esac
}

# A piece that failed before comes last, so that it keeps no other waiting.
todo=() again=() left=()
for piece in "${pieces[@]}"; do
    if [ "$piece" = tests ] && ! python3 -c 'import pytest' 2>/dev/null; then
        echo "tests: pytest is not installed here, so they are not run"
    elif grep -qx "$piece" failed.txt; then again+=("$piece")
    elif ! grep -q "^$piece:" done.txt; then todo+=("$piece"); fi
done

is_over=
for piece in "${todo[@]}" "${again[@]}"; do
    began=$SECONDS
    # A start takes seconds: it is not worth the last tenth of a call.
    if [ "$is_over" ] || ((limit - began <= limit / 10)); then left+=("$piece"); continue; fi
    choose_command "$piece"
    echo "== $piece: python3 ${command[*]}"
    timeout --foreground --preserve-status --kill-after 20 $((limit - began)) \
        python3 "${command[@]}" 2>&1 | tee -a "$piece.log"
    code=$?
    sed -i "/^$piece\$/d" failed.txt
    if ((code == 0)); then
        echo "$piece: $((SECONDS - began)) s; $(figure_of "$piece")" >> done.txt
    elif ((code == 75 || SECONDS >= limit && began > limit / 10)); then
        left+=("$piece")
        is_over=yes
    else
        echo "$piece" >> failed.txt
    fi
done

printf '\n== done, in %s\n' "$folder"
cat done.txt
while read -r piece; do
    printf '== %s FAILED; the end of %s:\n' "$piece" "$folder/$piece.log"
    tail -n 5 "$piece.log" | sed 's/^/    /'
done < failed.txt
[ ${#left[@]} = 0 ] || echo "== left, for the same line again: ${left[*]}"
files=(*.log runs/*/config.yaml runs/*/*.jsonl)
tar -czf results.tar.gz done.txt failed.txt "${files[@]}"
[ -s failed.txt ] && exit 1
[ ${#left[@]} = 0 ] || exit 75
