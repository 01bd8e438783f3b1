#!/usr/bin/env bash
# All of ViLD for one data set: (1) the network that proposes regions, trained on base classes; (2) its proposals, with their
# recall; (3) the teacher's embeddings of their crops; (4) the detector; (5) its test. What is done is not done again, and what
# was interrupted goes on where it was.
#
#   bash ViLD/scripts/pipeline.sh CONFIG OUT [PROCESSES] [section.key=value ...]
#
# OUT/proposer, OUT/proposals_val, OUT/proposals and OUT/store hold what detectors share, OUT/NAME a detector and its test; NAME
# is that of CONFIG, or model.variant where that is given. Another one with the same OUT begins at (4). One process per GPU, or
# CPU processes where there is none. PROPOSER_VALUES="section.key=value ..." are for the first network alone. EVAL="bbox segm":
# also mask AP. MOST=300: proposals of a training image. DEVICE=cpu. PYTHON names another interpreter than that of .venv.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: bash pipeline.sh CONFIG OUT [PROCESSES] [section.key=value ...]" >&2; exit 2; }
config="$1" out="$2"
shift 2
processes=1
if [ $# -ge 1 ] && [[ "$1" != *=* ]]; then processes="$1"; shift; fi
values=("$@") device=() variant=
[ -z "${DEVICE:-}" ] || device=(--device "$DEVICE")
source "$here/../scripts/_launch.sh"

stage() { printf '\n== %s\n' "$1"; }
run() { (launch "$processes" "$here/$1" "${@:2}" ${device[@]+"${device[@]}"}); }
train() {  # train FOLDER [section.key=value ...]: once
    [ -f "$1/done" ] && return
    run train.py "$config" --work-dir "$1" --resume "${@:2}"
    touch "$1/done"
}

# A plain detector of one class, "object", which sees base classes' boxes only.
read -r -a own <<<"${PROPOSER_VALUES:-}"
proposer=(${values[@]+"${values[@]}"} model.variant=supervised data.single_class=true model.masks=false
    data.sampling=uniform data.keep_empty=false 'model.start=""' ${own[@]+"${own[@]}"})

stage "1. the network that proposes regions"
train "$out/proposer" "${proposer[@]}"
stage "2. proposals of the validation images, and their recall"
run make_proposals.py "$config" "$out/proposer/latest.pt" --split val --out "$out/proposals_val" "${proposer[@]}"
stage "2. proposals of the training images"
run make_proposals.py "$config" "$out/proposer/latest.pt" --split train --out "$out/proposals" --most "${MOST:-300}" \
    "${proposer[@]}"

values+=("data.proposals=$out/proposals" "data.store=$out/store")
stage "3. embeddings of their crops"
run embed.py "$config" "${values[@]}"

for value in "${values[@]}"; do
    [[ "$value" != model.variant=* ]] || variant="${value#*=}"
done
detector="$out/${variant:-$(basename "$config" .toml)}"
stage "4. the detector"
train "$detector" "${values[@]}"
stage "5. test"
read -r -a kinds <<<"${EVAL:-bbox}"
run test.py "$config" "$detector/latest.pt" --out "$detector/test" --eval "${kinds[@]}" "${values[@]}"
