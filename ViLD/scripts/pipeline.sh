#!/usr/bin/env bash
# All of ViLD for one data set: (1) the network that proposes regions, trained on base classes; (2) its proposals, with their
# recall; (3) the teacher's embeddings of their crops; (4) the detector; (5) its test. What is done is not done again, and what
# was interrupted goes on where it was.
#
#   bash ViLD/scripts/pipeline.sh CONFIG OUT [PROCESSES] [section.key=value ...]
#
# OUT/proposer, OUT/proposals_val, OUT/proposals and OUT/store hold what detectors share, OUT/NAME a detector and its test; NAME
# is DETECTOR=NAME, or model.variant where that is given, else that of CONFIG. Another one with the same OUT begins at (4); a NAME
# whose detector was trained with another config or other values is refused, and so is an OUT of other data. One process per GPU,
# or CPU processes where there is none. PROPOSER_VALUES="section.key=value ..." are for the first network alone. EVAL="bbox segm":
# also mask AP. MOST=300: proposals of a training image. DEVICE=cpu. PYTHON and CLIPSELF_VENV name another interpreter than that
# of .venv. Relative paths are meant from the folder that the command is given in.
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
choose_python "$(cd "$here/.." && pwd)"
export PYTHON

stage() { printf '\n== %s\n' "$1"; }
run() { (launch "$processes" "$here/$1" "${@:2}" ${device[@]+"${device[@]}"}); }
train() {  # train FOLDER [section.key=value ...]: once
    [ -f "$1/done" ] && return
    run train.py "$config" --work-dir "$1" --resume "${@:2}"
    touch "$1/done"
}

# same_runs DETECTOR PROPOSER [value of the detector ...] -- [value of the proposer ...]: exit status 2 where a run in one of these
# folders was trained with another config or other values. What only tests read does not count. Of the proposer, which detectors of
# different configs share, what it learned from does, and the rest is only told.
same_runs() {
    [ -f "$1/config.toml" ] || [ -f "$2/config.toml" ] || return 0
    PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" - "$config" "$@" <<'PROGRAM' || exit 2
import sys
from pathlib import Path

from ovdet.results import settings_of
from ovdet.vild.assemble import read_config
from training.engine.errors import UserError, run_program

FILES = ("model.start", "model.trunk_weights", "teacher.pretrained", "teacher.cache_dir")
LEARNED = {"data.train_annotations", "data.train_images", "data.novel", "data.novel_frequency"}
UNREAD = ("test.", "data.val_", "train.eval_every", "teacher.precision")


def settings(path: str, values: list[str]) -> dict:
    config = read_config(path, values)
    found = {n: v for n, v in settings_of(config, training=True).items() if not n.startswith(UNREAD)}
    if config.train.steps:
        del found["train.epochs"]  # which a run takes from its steps
    for name in FILES:
        section, key = name.split(".")
        file = config.locate(getattr(getattr(config, section), key))
        found[name] = str(Path(file).resolve()) if file and Path(file).exists() else file
    return found


def differences(path: str, folder: str, values: list[str]) -> tuple[set[str], str]:
    """(what differs, the first of it in words)"""
    former = f"{folder}/config.toml"
    if not Path(former).is_file():
        return set(), ""
    now, then = settings(path, values), settings(former, [])
    other = [name for name in now if now[name] != then.get(name)]
    told = [f"{name} was {then.get(name)!r}, now it is {now[name]!r}" for name in other[:3]]
    return set(other), ", ".join(told) + (f" and {len(other) - 3} more" if len(other) > 3 else "")


def main() -> None:
    path, detector, proposer, *values = sys.argv[1:]
    between = values.index("--")
    other, told = differences(path, detector, values[:between])
    if other:
        raise UserError(f"{detector} was trained otherwise: {told}; name another one with DETECTOR=NAME, or another OUT")
    other, told = differences(path, proposer, values[between + 1 :])
    if other & LEARNED:
        raise UserError(f"{proposer} learned from other data: {told}; name another OUT")
    if other:
        print(f"note: {proposer} is taken as it is, though {told}")


sys.exit(run_program(main))
PROGRAM
}

# A plain detector of one class, "object", which sees base classes' boxes only.
read -r -a own <<<"${PROPOSER_VALUES:-}"
proposer=(${values[@]+"${values[@]}"} model.variant=supervised data.single_class=true model.masks=false
    data.sampling=uniform data.keep_empty=false 'model.start=""' ${own[@]+"${own[@]}"})

shared=("data.proposals=$out/proposals" "data.store=$out/store")
for value in ${values[@]+"${values[@]}"}; do
    [[ "$value" != model.variant=* ]] || variant="${value#*=}"
done
name="${DETECTOR:-${variant:-$(basename "$config" .toml)}}"
case "$name" in
    proposer | proposals | proposals_val | store | */*)
        echo "error: DETECTOR is \"$name\": OUT holds something else by that name, or it is no name; give another" >&2; exit 2 ;;
esac
detector="$out/$name"
same_runs "$detector" "$out/proposer" ${values[@]+"${values[@]}"} "${shared[@]}" -- "${proposer[@]}"

stage "1. the network that proposes regions"
train "$out/proposer" "${proposer[@]}"
stage "2. proposals of the validation images, and their recall"
run make_proposals.py "$config" "$out/proposer/latest.pt" --split val --out "$out/proposals_val" "${proposer[@]}"
stage "2. proposals of the training images"
run make_proposals.py "$config" "$out/proposer/latest.pt" --split train --out "$out/proposals" --most "${MOST:-300}" \
    "${proposer[@]}"

values+=("${shared[@]}")
stage "3. embeddings of their crops"
run embed.py "$config" "${values[@]}"

stage "4. the detector"
train "$detector" "${values[@]}"
stage "5. test"
read -r -a kinds <<<"${EVAL:-bbox}"
run test.py "$config" "$detector/latest.pt" --out "$detector/test" --eval "${kinds[@]}" "${values[@]}"
