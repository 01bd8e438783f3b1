# Sourced by the quick start and by what builds on it: their folders, their argument, their scenes, their clock.
# They go on in the clone's folder. $cores is the number of the machine's; $begin, when it began, may be set anew.

source "$(dirname "${BASH_SOURCE[0]}")/_python.sh"
from_here OUT QUICKSTART CLIPSELF_VENV PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
begin=$SECONDS

# take_smoke [ARGUMENT]: sets $smoke, to 1 for --smoke; anything else is refused.
take_smoke() {
    smoke=
    case "${1:-}" in
        "") ;;
        --smoke) smoke=1 ;;
        *) echo "error: unknown argument $1; the only one is --smoke" >&2; exit 2 ;;
    esac
}

# elapsed [SECOND]: minutes and seconds from $begin to then (now), as 12:34.
elapsed() {
    local seconds=$((${1:-$SECONDS} - begin))
    printf '%d:%02d' $((seconds / 60)) $((seconds % 60))
}

# stage NAME: says what begins.
stage() { printf '\n== %s (%s since the start)\n' "$1" "$(elapsed)"; }

# need_quickstart FOLDER WHAT FILE...: runs the quick start, which makes WHAT, where one of the files is missing.
need_quickstart() {
    local folder="$1" what="$2" file
    shift 2
    for file in "$@"; do
        [ -f "$file" ] && continue
        echo "== quick start: makes $what"
        OUT="$folder" bash scripts/quickstart.sh
        return
    done
}

# has_scenes FOLDER ARGUMENTS...: whether it holds complete scenes of these very arguments and of this very generator.
has_scenes() { [ "$(cat "$1/complete" 2>/dev/null)" = "$(state_of_scenes "${@:2}")" ]; }
state_of_scenes() { echo "$(cat src/training/scenes/*.py | cksum) $*"; }

# What the generator and the studies leave in a folder of scenes: nothing else is ever deleted there. The generator's own mark,
# which it writes before anything else, comes last, so that a folder whose deletion was broken off is still known.
SCENES=(complete train2017 val2017 pairs glip annotations scenes.json)

# made_here FOLDER: whether the generator or make_scenes says in it that they made it (former generators: in an annotation file).
made_here() {
    local begin='"info":{"description":"generated scenes"'
    grep -qs '"description":"generated scenes"' "$1/scenes.json" || has_begun "$1" ||
        [[ "$(head -c 100 "$1/annotations/instances_train2017.json" 2>/dev/null)" == "{$begin"* ]]
}
has_begun() { grep -Eqs '^[0-9]+ [0-9]+ .*--train [0-9]' "$1/complete"; }

# refuse FILE: ends, with exit status 2, as it would have to delete what it did not make.
refuse() {
    echo "error: $1 is there, and nothing says that this script made it: it is left alone; name another folder with OUT" >&2
    exit 2
}

# check_scenes FOLDER: refuses one that holds anything but scenes of the generator.
check_scenes() {
    local entry known
    if [ -e "$1" ] && [ ! -d "$1" ]; then refuse "$1"; fi
    for entry in "$1"/*; do
        if [ ! -e "$entry" ] && [ ! -L "$entry" ]; then continue; fi  # the pattern itself: the folder is empty
        for known in "${SCENES[@]}"; do
            if [ "${entry##*/}" = "$known" ] && made_here "$1"; then continue 2; fi
        done
        refuse "$entry"
    done
}

# take_folder OUT PATTERN...: OUT is where this script works. It deletes there what has one of these names, and may: it refuses,
# at its first run in OUT, any that is there already.
take_folder() {
    local out="$1" mark="$1/.made_by_script" pattern found
    shift
    if grep -qsxF -- "$*" "$mark"; then return; fi
    if ! has_begun "$out/data" && ! has_begun "$out/a"; then  # former runs left no mark, but complete scenes
        for pattern in "$@"; do
            for found in "$out"/$pattern; do
                if [ -e "$found" ] || [ -L "$found" ]; then refuse "$found"; fi
            done
        done
    fi
    { mkdir -p "$out" && echo "$*" >>"$mark"; } 2>/dev/null || {
        echo "error: OUT $out cannot be written: name another folder with OUT" >&2
        exit 2
    }
}

# make_scenes FOLDER ARGUMENTS...: generates them where it does not. Scenes of other arguments, or unfinished ones, go first.
make_scenes() {
    local folder="$1"
    shift
    if has_scenes "$folder" "$@"; then return; fi
    check_scenes "$folder"
    local name
    for name in "${SCENES[@]}"; do rm -rf -- "${folder:?}/$name"; done
    OMP_NUM_THREADS=1 "$PY" -m training.scenes --out "$folder" --workers "$cores" "$@"
    state_of_scenes "$@" >"$folder/complete"
}

# held_out_scenes TRAIN VAL: sets $scene_args to those of scenes as in the quick start, others than those it trained on, with
# 3 of the 16 things held out.
held_out_scenes() {
    scene_args=(--train "$1" --val "$2" --size 128 --things 16 --stuff 6 --pattern-names
        --min-object 0.28 --max-object 0.5 --max-objects 4 --novel 3 --seed 77)
}

# novel_of FOLDER: names of the classes held out of its scenes, as a TOML list.
novel_of() { "$PY" -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))["novel"]))' "$1/annotations/split.json"; }
