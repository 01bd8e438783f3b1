#!/usr/bin/env bash
# Does distillation help to find classes without a training box? The whole of ViLD on generated scenes, from the network that
# proposes regions to the test, with the quick start's tiny CLIP as the teacher: ViLD-text, ViLD-image, ViLD, the ensemble, and CLIP
# itself on proposals, on two seeds; recall of the proposals; and a vocabulary expanded by colours.
# Within 40 minutes on 2 CPU cores, after the quick start (run first where its models are missing).
#
#   bash ViLD/scripts/study.sh            results in ViLD/work_dirs/study: result.md, result.json and pictures
#   bash ViLD/scripts/study.sh --smoke    the same with a handful of images and steps, to see that everything runs
#   QUICKSTART=DIR OUT=DIR SEEDS="0 1"    the quick start's folder; another folder for the results; the seeds
#
# An interrupted study goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

smoke=
case "${1:-}" in
    "") ;;
    --smoke) smoke=1 ;;
    *) echo "error: unknown argument $1; the only one is --smoke" >&2; exit 2 ;;
esac
quickstart="${QUICKSTART:-quickstart}"
out="${OUT:-ViLD/work_dirs/study${smoke:+_smoke}}"
seeds="${SEEDS:-0 1}"
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
train=1200 val=250 proposer_steps=400 steps=400 warmup=30
if [ -n "$smoke" ]; then train=24 val=12 proposer_steps=8 steps=4 warmup=1; fi

source scripts/_venv.sh
ensure_venv vild
export PYTHON="$PY" PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive DEVICE=cpu
teacher="$quickstart/logs/start/checkpoints/clipself.pt"
if [ ! -f "$teacher" ]; then
    echo "== quick start: makes the teacher"
    OUT="$quickstart" bash scripts/quickstart.sh
fi
begin=$SECONDS
mkdir -p "$out"
out="$(cd "$out" && pwd)"
stage() { printf '\n== %s (%d:%02d since the start)\n' "$1" $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)); }

stage "generate scenes"
data="$out/data"
# Scenes as in the quick start, others than those it trained on, with 3 of the 16 things held out.
scene_args=(--train "$train" --val "$val" --size 128 --things 16 --stuff 6 --pattern-names
    --min-object 0.28 --max-object 0.5 --max-objects 4 --novel 3 --seed 77)
state="$(cat src/training/scenes/*.py | cksum) ${scene_args[*]}"
if [ "$(cat "$data/complete" 2>/dev/null)" != "$state" ]; then
    rm -rf "$data" "$out"/seed_*
    "$PY" -m training.scenes --out "$data" --workers "$cores" "${scene_args[@]}"
    echo "$state" >"$data/complete"
fi
novel="$("$PY" -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))["novel"]))' "$data/annotations/split.json")"
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
printf '%d:%02d minutes; tables: %s, pictures: %s\n' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)) "$out/result.md" \
    "$out/detections.png $out/expansion.png"
