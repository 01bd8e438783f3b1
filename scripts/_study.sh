# Sourced, in the clone's folder, by the quick start and by what builds on it: their argument, their scenes, their clock.
# $cores is the number of the machine's; $begin, when it began, may be set anew.

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

# make_scenes FOLDER ARGUMENTS...: generates them where it does not.
make_scenes() {
    local folder="$1"
    shift
    if has_scenes "$folder" "$@"; then return; fi
    rm -rf "$folder"
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
