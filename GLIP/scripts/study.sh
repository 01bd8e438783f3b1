#!/usr/bin/env bash
# Does a GLIP on the quick start's towers ground phrases, also such as it never saw? Two seeds, against chance, against the same
# training on a text tower that learns nothing, and on one that begins with nothing; then full, linear and prompt tuning on a
# second domain with few examples. Within 45 minutes on 2 CPU cores, after the quick start (run first where its models are
# missing).
#
#   bash GLIP/scripts/study.sh            results in GLIP/work_dirs/study: result.md, and pictures
#   bash GLIP/scripts/study.sh --smoke    the same with a handful of images and steps, to see that everything runs
#   QUICKSTART=DIR OUT=DIR SEEDS="0 1"    the quick start's folder; another folder for the results; the seeds
#   CLIPSELF_VENV=DIR, PYTHON=FILE        another environment than .venv; the interpreter to make it from: see scripts/_venv.sh
#
# Relative folders are meant from where the command is given; defaults are in the clone. Running it again trains anew: its own
# scenes (OUT/a, OUT/b, unless they are complete) and runs are deleted; what is there and was not made by this script is refused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/_study.sh"
take_smoke "${1:-}"
quickstart="${QUICKSTART:-quickstart}"
out="${OUT:-GLIP/work_dirs/study${smoke:+_smoke}}"
seeds="${SEEDS:-0 1}"
check_scenes "$out/a"
check_scenes "$out/b"
take_folder "$out" 'trained_*' 'untrained_*' 'scratch_*' 'tune_*'
train=4000 val=400 steps=1800 train_b=600 val_b=150 tune_steps=100 shots="1 3 10 0"
if [ -n "$smoke" ]; then train=40 val=12 steps=4 train_b=24 val_b=8 tune_steps=2 shots="1 0" seeds="0"; fi

source scripts/_venv.sh
ensure_venv glip
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
start="$quickstart/logs/clipself/checkpoints/clipself.pt"
known="$quickstart/data/annotations/instances_train2017.json"
need_quickstart "$quickstart" "the towers" "$start" "$known"
begin=$SECONDS
out="$(cd "$out" && pwd)"

stage "generate scenes"
# 32 things of 4 colours and 8 shapes; 6 pairs are held out, of which the start model has met 4.
make_scenes "$out/a" --train "$train" --val "$val" --size 128 --things 32 --colors 4 --stuff 6 --pattern-names \
    --min-object 0.28 --max-object 0.5 --max-objects 4 --novel 6 --seed 177
# The second domain: smaller things with any pattern, more of them, on other ground.
make_scenes "$out/b" --train "$train_b" --val "$val_b" --size 128 --things 12 --colors 4 --stuff 8 \
    --min-object 0.2 --max-object 0.35 --max-objects 6 --min-aspect 0.7 --seed 178
"$PY" GLIP/scripts/study_data.py "$out/a" --known "$known"
novel="$(novel_of "$out/a")"
cat >"$out/captions.toml" <<END
[set]
kind = "grounding"
annotations = "$out/a/glip/train.json"
images = "$out/a/train2017"
packing = true
END
cat >"$out/detection.toml" <<END
[set]
kind = "detection"
annotations = "$out/a/glip/detection.json"
images = "$out/a/train2017"
negatives = 8
END

config=GLIP/configs/clip_vitti8.toml
common=(--device cpu "clip.pretrained=$start" "train.eval_every=0" "train.save_every=1000")
phrases=("data.protocol=flickr" "data.val_annotations=$out/a/glip/val.json" "data.val_images=$out/a/val2017"
    "data.sentences=$out/a/glip" "test.score=0.0")
names=("data.protocol=coco" "data.val_annotations=$out/a/annotations/instances_val2017.json"
    "data.val_images=$out/a/val2017" "data.novel=$novel")

ground() {  # ground NAME SEED OVERRIDES...: train on domain A, and test phrases and names
    local name="$1" seed="$2" folder="$out/$1_$2"
    shift 2
    rm -rf "$folder"
    "$PY" GLIP/train.py "$config" --work-dir "$folder" --max-steps "$steps" "${common[@]}" train.epochs=1000 \
        "train.seed=$seed" "data.train_sets=[\"$out/captions.toml\", \"$out/detection.toml\"]" "$@" &&
    "$PY" GLIP/test.py "$folder/model_last.pt" --out "$folder/phrases" --device cpu "${phrases[@]}" &&
    "$PY" GLIP/test.py "$folder/model_last.pt" --out "$folder/names" --device cpu "${names[@]}"
}

tune() {  # tune MODE SHOTS SEED: from the model of the seed, on domain B
    local mode="$1" shot="$2" seed="$3" folder="$out/tune_$1_$2_$3" rate=3e-4
    case "$mode" in linear_prob) rate=1e-3 ;; language_prompt_v2) rate=2e-2 ;; esac
    rm -rf "$folder"
    "$PY" GLIP/train.py "$config" --work-dir "$folder" --max-steps "$tune_steps" "${common[@]}" train.epochs=1000 \
        "model.weights=$out/trained_$seed/whole.pt" "train.mode=$mode" "train.lr=$rate" "train.seed=$seed" \
        "data.shots=$shot" "data.shot_seed=$((3 * 10 ** seed))" data.negatives=8 train.warmup_steps=10 \
        "data.train_annotations=$out/b/annotations/instances_train2017.json" "data.train_images=$out/b/train2017" &&
    "$PY" GLIP/test.py "$folder/model_last.pt" --out "$folder/test" --device cpu data.protocol=coco \
        "data.val_annotations=$out/b/annotations/instances_val2017.json" "data.val_images=$out/b/val2017"
}

whole() {  # whole SEED: the trained model with its towers in one file, and how well it does on domain B untuned
    "$PY" tools/convert_glip.py "$out/trained_$1/model_last.pt" "$out/trained_$1/whole.pt" --config "$config" --force \
        "clip.pretrained=$start" &&
    "$PY" GLIP/test.py "$out/trained_$1/model_last.pt" --out "$out/trained_$1/domain_b" --device cpu data.protocol=coco \
        "data.val_annotations=$out/b/annotations/instances_val2017.json" "data.val_images=$out/b/val2017"
}

run_all() {  # run_all: lines of commands from the standard input, as many at a time as there are cores
    local failed=0 line log number=0
    mkdir -p "$out/logs"
    while read -r line; do
        while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n || failed=1; done
        number=$((number + 1)) log="$out/logs/${line// /_}.log"
        echo "$line"
        # shellcheck disable=SC2086
        (OMP_NUM_THREADS=1 $line) >"$log" 2>&1 || { echo "error: $line failed, see $log" >&2; tail -n 5 "$log" >&2; exit 1; } &
    done
    while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n || failed=1; done
    [ "$failed" = 0 ] || exit 1
}

stage "train on domain A: with the quick start's text tower, without learning in one of random weights, and from it; seeds $seeds"
for seed in $seeds; do
    echo "ground trained $seed"
    echo "ground untrained $seed text.weights=random text.frozen=true"
    echo "ground scratch $seed text.weights=random"
done | { run_all; }
stage "whole models"
for seed in $seeds; do echo "whole $seed"; done | { run_all; }
stage "tune on domain B"
for seed in $seeds; do
    for shot in $shots; do
        for mode in full linear_prob language_prompt_v2; do echo "tune $mode $shot $seed"; done
    done
done | { run_all; }

stage "report"
"$PY" GLIP/scripts/study_report.py "$out" --seeds $seeds --shots $shots
# A picture of each of the first test captions.
"$PY" - "$out/a/glip/val.json" <<'PROGRAM' >"$out/pictures.tsv"
import json
import sys

for image in json.load(open(sys.argv[1]))["images"][:6]:
    print(image["file_name"], image["caption"], sep="\t")
PROGRAM
while IFS=$'\t' read -r file caption; do
    "$PY" GLIP/ground.py "$out/a/val2017/$file" --checkpoint "$out/trained_${seeds%% *}/model_last.pt" --device cpu \
        --caption "$caption" --score 0.4 --out "$out/pictures/${file%.*}" </dev/null
done <"$out/pictures.tsv"
echo "$(elapsed) minutes"
