#!/usr/bin/env bash
# Does a dense CLIP help an open-vocabulary detector? Detectors are trained alike on the base classes of generated scenes, on
# the start model of the quick start and on its CLIPSelf model, and tested on base and held-out classes.
# Within 30 minutes on 2 CPU cores, after the quick start (run first where its models are missing).
#
#   bash F-ViT/scripts/demo.sh            results in F-ViT/work_dirs/demo
#   bash F-ViT/scripts/demo.sh --full     three seeds of both, and a row for each of our own choices alone (19 runs)
#   bash F-ViT/scripts/demo.sh --smoke    a few rows with a handful of images, to see that everything runs
#   QUICKSTART=DIR OUT=DIR                the quick start's folder; another folder for the results
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

smoke= full=
case "${1:-}" in
    "") ;;
    --full) full=1 ;;
    --smoke) smoke=1 ;;
    *) echo "error: unknown argument $1; use --full or --smoke" >&2; exit 2 ;;
esac
quickstart="${QUICKSTART:-quickstart}"
out="${OUT:-F-ViT/work_dirs/demo${smoke:+_smoke}}"
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
train=1200 val=250 epochs=2
if [ -n "$smoke" ]; then train=16 val=8 epochs=1; fi

source scripts/_venv.sh
ensure_venv fvit
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

declare -A weights=(
    [start]="$quickstart/logs/start/checkpoints/clipself.pt"
    [clipself]="$quickstart/logs/clipself/checkpoints/clipself.pt"
)
if [ ! -f "${weights[start]}" ] || [ ! -f "${weights[clipself]}" ]; then
    echo "== quick start: makes the two models"
    OUT="$quickstart" bash scripts/quickstart.sh
fi

begin=$SECONDS
data="$out/data"
# Scenes as in the quick start, others than those it trained on, with 3 of the 16 things held out.
scene_args=(--train "$train" --val "$val" --size 128 --things 16 --stuff 6 --pattern-names
    --min-object 0.28 --max-object 0.5 --max-objects 4 --novel 3 --seed 77)
state="$(cat src/training/scenes/*.py | cksum) ${scene_args[*]}"
if [ "$(cat "$data/complete" 2>/dev/null)" != "$state" ]; then
    echo "== generate scenes"
    rm -rf "$data"
    OMP_NUM_THREADS=1 "$PY" -m training.scenes --out "$data" --workers "$cores" "${scene_args[@]}"
    echo "$state" >"$data/complete"
fi
"$PY" F-ViT/tools/prepare_open_vocabulary.py coco --train "$data/annotations/instances_train2017.json" \
    --val "$data/annotations/instances_val2017.json" --split "$data/annotations/split.json"
novel="$("$PY" -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))["novel"]))' "$data/annotations/split.json")"

echo "== train and test the detectors"
jobs=$((cores >= 2 ? 2 : 1))  # side by side, on half of the cores each
threads=$((cores / jobs > 4 ? 4 : cores / jobs))
"$PY" F-ViT/scripts/demo_runs.py --start "${weights[start]}" --clipself "${weights[clipself]}" --out "$out" ${full:+--full} \
    ${smoke:+--only start clipself refined former} --jobs "$jobs" --threads "${OMP_NUM_THREADS:-$threads}" "train.epochs=$epochs" "data.novel=$novel" \
    "data.train_annotations=$data/annotations/instances_train2017_base.json" "data.train_images=$data/train2017" \
    "data.val_annotations=$data/annotations/instances_val2017_ov16.json" "data.val_images=$data/val2017"
printf '%d:%02d minutes\n' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60))
