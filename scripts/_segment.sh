# Sourced by segment_*.sh: scores of dense labels on one data set, a line per reading, all readings from one pass.
#
#   MODEL, PRETRAINED   the model and its weights (default EVA02-CLIP-B-16 with checkpoints/EVA02_CLIP_B_psz16_s8B.pt)
#   DATA                folder that data sets were unpacked into (default data), each below it as data/README.md shows; COCO's
#                       photographs are looked for in DATA and in DATA/coco. The training recipes' DATA is COCO's own folder
#   PROTOCOL            own, maskclip, sclip, naclip, clearclip or proxyclip (default sclip)
#   READOUTS            dense readings (default: the model's own, which its weights name, as "own", and eight by name)
#   OUT                 folder of results (default logs/segment); a run that was cut short goes on there. Of
#                       logs/my_run/checkpoints/clipself.pt they are in OUT/DATASET-PROTOCOL-my_run-clipself
#   NPROC, PYTHON, CLIPSELF_VENV   as for the training recipes
# Further arguments go to "python -m ovseg.evaluate". Relative paths are meant from the folder that the command is given in.

data="${DATA:-}"  # _common.sh has the default of the training recipes
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
DATA="${data:-${CLONE}data}"

MODEL="${MODEL:-EVA02-CLIP-B-16}"
PROTOCOL="${PROTOCOL:-sclip}"
READOUTS="${READOUTS:-own value value_bare vanilla sclip sclip_bare clearclip kk_bare naclip}"
OUT="${OUT:-${CLONE}logs/segment}"
WEIGHTS=(--pretrained "${PRETRAINED:-eva}")
if [ -z "${PRETRAINED:-}" ]; then WEIGHTS+=(--cache-dir "$CHECKPOINTS/EVA02_CLIP_B_psz16_s8B.pt"); fi

# weights_name: what PRETRAINED is called in OUT: the file, behind the folder of the run (or whichever it lies in).
weights_name() {
    local file="${PRETRAINED:-start}" folder=""
    if [[ "$file" == */* ]]; then
        folder="${file%/*}"
        folder="${folder%/checkpoints}"
        folder="${folder##*/}"
        if [ "$folder" = . ]; then folder=""; fi
    fi
    file="${file##*/}"
    echo "${folder:+$folder-}${file%.*}"
}

# segment DATASET ARGUMENTS...
segment() {
    local dataset="$1" processes="${NPROC:-$(visible_gpus)}" launch=("$PYTHON" -m)
    shift
    if [ "$processes" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m --)
    fi
    # shellcheck disable=SC2086 (readings are words)
    "${launch[@]}" ovseg.evaluate --model "$MODEL" "${WEIGHTS[@]}" --dataset "$dataset" --data-root "$DATA" \
        --protocol "$PROTOCOL" --readouts $READOUTS --output "$OUT/$dataset-$PROTOCOL-$(weights_name)" "$@"
}
