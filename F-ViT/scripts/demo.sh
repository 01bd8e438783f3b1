#!/usr/bin/env bash
# Does a dense CLIP help an open-vocabulary detector? Detectors are trained alike on the base classes of generated scenes, on
# the start model of the quick start and on its CLIPSelf model, and tested on base and held-out classes.
# Within 30 minutes on 2 CPU cores, after the quick start (run first where its models are missing).
#
#   bash F-ViT/scripts/demo.sh            results in F-ViT/work_dirs/demo
#   bash F-ViT/scripts/demo.sh --full     three seeds of both, and a row for each of our own choices alone (19 runs)
#   bash F-ViT/scripts/demo.sh --smoke    a few rows with a handful of images, to see that everything runs
#   QUICKSTART=DIR OUT=DIR                the quick start's folder; another folder for the results
#   CLIPSELF_VENV=DIR, PYTHON=FILE        another environment than .venv; the interpreter to make it from: see scripts/_venv.sh
#
# Relative folders are meant from where the command is given; defaults are in the clone. Scenes in OUT/data are made anew where
# they are not complete; what is there and was not made by this script is refused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/_study.sh"

smoke= full=
case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' F-ViT/scripts/demo.sh; exit 0 ;;
    --full) full=1 ;;
    --smoke) smoke=1 ;;
    *) echo "error: unknown argument $1; use --full or --smoke" >&2; exit 2 ;;
esac
quickstart="${QUICKSTART:-quickstart}"
out="${OUT:-F-ViT/work_dirs/demo${smoke:+_smoke}}"
check_scenes "$out/data"
train=1200 val=250 epochs=2
if [ -n "$smoke" ]; then train=16 val=8 epochs=1; fi

source scripts/_venv.sh
ensure_venv fvit
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

declare -A weights=(
    [start]="$quickstart/logs/start/checkpoints/clipself.pt"
    [clipself]="$quickstart/logs/clipself/checkpoints/clipself.pt"
)
need_quickstart "$quickstart" "the two models" "${weights[@]}"

begin=$SECONDS
data="$out/data"
held_out_scenes "$train" "$val"
has_scenes "$data" "${scene_args[@]}" || stage "generate scenes"
make_scenes "$data" "${scene_args[@]}"
"$PY" F-ViT/tools/prepare_open_vocabulary.py coco --train "$data/annotations/instances_train2017.json" \
    --val "$data/annotations/instances_val2017.json" --split "$data/annotations/split.json"
novel="$(novel_of "$data")"

stage "train and test the detectors"
jobs=$((cores >= 2 ? 2 : 1))  # side by side, on half of the cores each
threads=$((cores / jobs > 4 ? 4 : cores / jobs))
"$PY" F-ViT/scripts/demo_runs.py --start "${weights[start]}" --clipself "${weights[clipself]}" --out "$out" ${full:+--full} \
    ${smoke:+--only start clipself refined former} --jobs "$jobs" --threads "${OMP_NUM_THREADS:-$threads}" "train.epochs=$epochs" "data.novel=$novel" \
    "data.train_annotations=$data/annotations/instances_train2017_base.json" "data.train_images=$data/train2017" \
    "data.val_annotations=$data/annotations/instances_val2017_ov16.json" "data.val_images=$data/val2017"
echo "$(elapsed) minutes"
