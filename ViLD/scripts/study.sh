#!/usr/bin/env bash
# Does distillation help to find classes without a training box? The whole of ViLD on generated scenes, from the network that
# proposes regions to the test, with the quick start's tiny CLIP as the teacher: ViLD-text, ViLD-image, ViLD, the ensemble, and CLIP
# itself on proposals, on two seeds; recall of the proposals; and a vocabulary expanded by colours.
# Within 40 minutes on 2 CPU cores, after the quick start (run first where its models are missing).
#
#   bash ViLD/scripts/study.sh            results in ViLD/work_dirs/study: result.md, result.json and pictures
#   bash ViLD/scripts/study.sh --smoke    the same with a handful of images and steps, to see that everything runs
#   QUICKSTART=DIR OUT=DIR SEEDS="0 1"    the quick start's folder; another folder for the results; the seeds
#   CLIPSELF_VENV=DIR, PYTHON=FILE        another environment than .venv; the interpreter to make it from: see scripts/_venv.sh
#
# An interrupted study goes on where it was. Relative folders are meant from where the command is given; defaults are in the clone.
# Where scenes change, its own OUT/data and OUT/seed_* are deleted; what is there and was not made by this script is refused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/_study.sh"
take_smoke "${1:-}"
quickstart="${QUICKSTART:-quickstart}"
out="${OUT:-ViLD/work_dirs/study${smoke:+_smoke}}"
seeds="${SEEDS:-0 1}"
data="$out/data"
check_scenes "$data"
take_folder "$out" 'seed_*'
train=1200 val=250 proposer_steps=400 steps=400 warmup=30
if [ -n "$smoke" ]; then train=24 val=12 proposer_steps=8 steps=4 warmup=1; fi

source scripts/_venv.sh
ensure_venv vild
teacher="$quickstart/logs/start/checkpoints/clipself.pt"
need_quickstart "$quickstart" "the teacher" "$teacher"
# After the quick start, which has as many threads as it likes.
export PYTHON="$PY" PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive DEVICE=cpu
begin=$SECONDS
out="$(cd "$out" && pwd)"

stage "generate scenes"
data="$out/data"
held_out_scenes "$train" "$val"
has_scenes "$data" "${scene_args[@]}" || rm -rf "$out"/seed_*
make_scenes "$data" "${scene_args[@]}"
novel="$(novel_of "$data")"
config=ViLD/scripts/study.toml
values=("teacher.pretrained=$teacher" "data.novel=$novel"
    "data.train_annotations=$data/annotations/instances_train2017.json" "data.train_images=$data/train2017"
    "data.val_annotations=$data/annotations/instances_val2017.json" "data.val_images=$data/val2017")
as_proposer=(model.variant=supervised data.single_class=true)

seed_runs() {  # seed_runs SEED: everything of a seed; what is done is not done again
    local folder="$out/seed_$1" own=("${values[@]}" "train.seed=$1") row variant
    for variant in text image vild ensemble; do
        PROPOSER_VALUES="train.steps=$proposer_steps" MOST=20 bash ViLD/scripts/pipeline.sh "$config" "$folder" 1 "${own[@]}" \
            "model.start=$folder/proposer/latest.pt" "train.steps=$steps" "train.warmup_steps=$warmup" "model.variant=$variant" || return
    done
    for row in clip clip-objectness; do
        "$PY" ViLD/test.py "$config" "$folder/proposer/latest.pt" --out "$folder/$row/test" --eval bbox --crops "$row" --device cpu \
            "${own[@]}" "${as_proposer[@]}" || return
    done
}

stage "seeds $seeds, side by side"
pids=()
for seed in $seeds; do
    while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n || true; done
    (seed_runs "$seed") >"$out/seed_$seed.log" 2>&1 &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ "$failed" = 0 ] || { echo "error: a seed failed; the end of the logs:" >&2; tail -n 5 "$out"/seed_*.log >&2; exit 1; }

stage "report"
"$PY" ViLD/scripts/study_report.py table "$out" --seeds $seeds
"$PY" ViLD/scripts/study_report.py enlarge "$out"
first="$out/seed_${seeds%% *}/ensemble/latest.pt"
names="$("$PY" -c 'import json, sys; print(",".join(sum(json.load(open(sys.argv[1])).values(), [])))' "$data/annotations/split.json")"
# "striped square" and so on: what is left of the names without their colours.
shapes="$(tr ',' '\n' <<<"$names" | cut -d ' ' -f 2- | sort -u | paste -s -d ',' -)"
"$PY" ViLD/detect.py "$out/enlarged" --checkpoint "$first" --classes "$names" --score 0.3 --out "$out/detections" --device cpu
"$PY" ViLD/detect.py "$out/enlarged" --checkpoint "$first" --classes "$shapes" --attributes "red,green,blue,yellow,purple" \
    --score 0.2 --out "$out/expansions" --device cpu
"$PY" ViLD/scripts/study_report.py sheet "$out/detections" "$out/detections.png"
"$PY" ViLD/scripts/study_report.py sheet "$out/expansions" "$out/expansion.png"
echo "$(elapsed) minutes; tables: $out/result.md, pictures: $out/detections.png $out/expansion.png"
