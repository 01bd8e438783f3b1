# Sourced by segment_*.sh: scores of dense labels on one data set, a line per reading, all readings from one pass.
#
#   MODEL, PRETRAINED   the model and its weights (default EVA02-CLIP-B-16 with checkpoints/EVA02_CLIP_B_psz16_s8B.pt)
#   DATA                folder that the data set was unpacked into (default data)
#   PROTOCOL            own, maskclip, sclip, naclip, clearclip or proxyclip (default sclip)
#   READOUTS            dense readings (default: eight that need nothing but the model)
#   OUT                 folder of results (default logs/segment); a run that was cut short goes on there
#   NPROC, PYTHON       as for the training recipes
# Further arguments go to "python -m ovseg.evaluate".

DATA="${DATA:-data}"  # before _common.sh, whose default is that of the training recipes
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

MODEL="${MODEL:-EVA02-CLIP-B-16}"
PROTOCOL="${PROTOCOL:-sclip}"
READOUTS="${READOUTS:-value value_bare vanilla sclip sclip_bare clearclip kk_bare naclip}"
OUT="${OUT:-logs/segment}"
WEIGHTS=(--pretrained "${PRETRAINED:-eva}")
if [ -z "${PRETRAINED:-}" ]; then WEIGHTS+=(--cache-dir "$CHECKPOINTS/EVA02_CLIP_B_psz16_s8B.pt"); fi

# segment DATASET ARGUMENTS...
segment() {
    local dataset="$1" processes="${NPROC:-$(visible_gpus)}" launch=("$PYTHON" -m)
    shift
    if [ "$processes" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m --)
    fi
    local name; name="$(basename "${PRETRAINED:-start}")"
    # shellcheck disable=SC2086 (readings are words)
    "${launch[@]}" ovseg.evaluate --model "$MODEL" "${WEIGHTS[@]}" --dataset "$dataset" --data-root "$DATA" \
        --protocol "$PROTOCOL" --readouts $READOUTS --output "$OUT/$dataset-$PROTOCOL-${name%.*}" "$@"
}
