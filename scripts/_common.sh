# Sourced by the recipes: how many processes, where the data is, and how the program is started.
#
#   NPROC          processes on this machine; by default one per visible GPU, or 1 without a GPU
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines, as for torchrun
#   MAX_RESTARTS   how often a run that dies is started again, from its newest checkpoint (default 0)
#   DATA           folder of COCO (default data/coco; for segment_*.sh see _segment.sh);  LVIS: folder of LVIS (default
#                  data/lvis_v1), with its annotations in annotations/ or in itself
#   CHECKPOINTS    folder of the start models (default checkpoints)
#   REGIONS, VFM   recipes of salient regions: the file of these (default coco_salient_regions.json in DATA; several
#                  machines share it), and the timm trunk that finds them
#   PYTHON, CLIPSELF_VENV   which Python runs: see _python.sh
#   CLIPSELF_DOCS_SMOKE  when set, two steps on small inputs instead of the schedule: to see that a command runs
#
# Relative paths, in variables and in further arguments, are meant from the folder that the command is given in; defaults (data,
# checkpoints, logs) are the clone's.

CLONE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/"
source "${CLONE}scripts/_python.sh"
choose_python "${CLONE%/}"
export PYTHONPATH="${CLONE}src${PYTHONPATH:+:$PYTHONPATH}"
if [ "$CLONE" -ef . ]; then CLONE=; fi  # from here on what stands before a path in the clone
DATA="${DATA:-${CLONE}data/coco}"
LVIS="${LVIS:-${CLONE}data/lvis_v1}"
CHECKPOINTS="${CHECKPOINTS:-${CLONE}checkpoints}"
REGIONS="${REGIONS:-$DATA/coco_salient_regions.json}"
LVIS_TRAIN="$LVIS/annotations/lvis_v1_train.json"
if [ ! -f "$LVIS_TRAIN" ] && [ -f "$LVIS/lvis_v1_train.json" ]; then LVIS_TRAIN="$LVIS/lvis_v1_train.json"; fi

visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        local list="${CUDA_VISIBLE_DEVICES//[[:space:]]/}"
        if [ -z "$list" ] || [ "$list" = "-1" ]; then echo 0; else awk -F, '{print NF}' <<< "$list"; fi
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# run_training ARGUMENTS...: training, in as many processes as run_module says.
run_training() {
    if [ -n "${CLIPSELF_DOCS_SMOKE:-}" ]; then
        set -- "$@" --max-steps 2 --max-boxes 4 --workers 0 --det-image-size 112 --eval-image-sizes 112
    fi
    run_module training.main ${CLONE:+--logs "${CLONE}logs"} "$@"
}

# run_module MODULE ARGUMENTS...: a program under torchrun, in place of this shell.
run_module() {
    local module="$1"
    shift
    local processes="${NPROC:-$(visible_gpus)}"
    if [ "$processes" -lt 1 ]; then processes=1; fi
    local nodes="${NNODES:-1}" where=(--standalone)
    if [ "$nodes" != 1 ]; then
        where=(--nnodes "$nodes" --node_rank "${NODE_RANK:?NODE_RANK is not set: the number of this machine}"
            --master_addr "${MASTER_ADDR:?MASTER_ADDR is not set: the address of machine 0}"
            --master_port "${MASTER_PORT:-29500}")
    fi
    # Processes share the cores of the machine.
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        local cores; cores=$(getconf _NPROCESSORS_ONLN)
        export OMP_NUM_THREADS=$(( cores / processes > 0 ? cores / processes : 1 ))
    fi
    if [ "$processes" = 1 ] && [ "$nodes" = 1 ] && [ "${MAX_RESTARTS:-0}" = 0 ]; then
        exec "$PYTHON" -m "$module" "$@"
    fi
    # Restarted processes must not meet the addresses of the former ones in a store that torchrun kept.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # "--" keeps torchrun from taking our --logs for an abbreviation of its --logs-specs.
    exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" "${where[@]}" \
        --max-restarts "${MAX_RESTARTS:-0}" -m -- "$module" "$@"
}

# The two published start models: name, checkpoint, patch, size, blocks, class embeddings.
use_vitb16() {
    MODEL_ARGS=(--model EVA02-CLIP-B-16 --pretrained eva --cache-dir "$CHECKPOINTS/EVA02_CLIP_B_psz16_s8B.pt"
        --det-image-size 1024 --downsample-factor 16)
    BLOCKS=12
    class_embeddings "${CLONE}metadata/coco_panoptic_clip_hand_craft_EVACLIP_ViTB16.npy"
}

use_vitl14() {
    MODEL_ARGS=(--model EVA02-CLIP-L-14-336 --pretrained eva --cache-dir "$CHECKPOINTS/EVA02_CLIP_L_336_psz14_s6B.pt"
        --det-image-size 896 --downsample-factor 14)
    BLOCKS=24
    class_embeddings "${CLONE}metadata/coco_panoptic_clip_hand_craft_EVACLIP_ViTL14x336.npy"
}

# The file of the published repository when it is there; otherwise the program computes the embeddings once.
class_embeddings() {
    if [ -f "$1" ]; then MODEL_ARGS+=(--embed-path "$1"); fi
}

VAL_ARGS=(--val-data "$DATA/annotations/panoptic_val2017.json" --val-image-root "$DATA/val2017"
    --val-segm-root "$DATA/annotations/panoptic_val2017")

# Embeddings of the 4764 nouns: read when they are there, else computed from the category names of the annotations.
NOUN_ARGS=()
for file in "$DATA"/coco_pseudo_4764_embeddings.npy "${CLONE}"metadata/coco_pseudo_4764_embeddings.npy; do
    if [ -f "$file" ]; then NOUN_ARGS=(--train-embed-path "$file"); fi
done

# Shared by all training recipes: batch 2 per process, 6 epochs, AdamW 1e-5.
recipe_args() {
    RECIPE_ARGS=(--batch-size 2 --epochs 6 --lr 1e-5 --wd 0.1 --warmup 1000 --workers 4 --extract-type v2
        --lock-image --lock-image-unlocked-groups "$BLOCKS" --zeroshot-frequency 1 --save-frequency 1
        --log-every-n-steps 100)
}

# train_on_salient_regions ARGUMENTS...: training on what stands out in the training images, which is in the file REGIONS: found by
# a foundation model unless it is there. The arguments are checked first; those that only ask for help find nothing, and neither
# do those that train on another file.
train_on_salient_regions() {
    local argument search model=(${VFM:+--vfm "$VFM"})
    for argument in "$@"; do
        case "$argument" in -h | --help | --help-all) run_training "$@" ;; esac  # does not return
    done
    if [ ! -f "$REGIONS" ]; then
        search="$("$PYTHON" - "$REGIONS" "$@" <<'PROGRAM'
import sys

from training.engine.errors import UserError, run_program
from training.params import parse_args


def main() -> None:
    regions, *arguments = sys.argv[1:]
    options = parse_args(arguments)
    if options.data.train_data != regions:
        return
    if options.run.dry_run:
        raise UserError(
            f"--dry-run: {regions} is not there, and finding the regions takes hours: make it first, by the recipe "
            "without --dry-run or python -m training.propose, or name one with REGIONS"
        )
    print("search")


sys.exit(run_program(main))
PROGRAM
        )" || exit 2
        if [ -n "${CLIPSELF_DOCS_SMOKE:-}" ]; then
            model=(--vfm test_vit.r160_in1k --vfm-weights random --cells 4 --workers 0)
        fi
        if [ "$search" = search ]; then  # in a shell of its own, whose place the program takes
            ( run_module training.propose ${model[@]+"${model[@]}"} --images "$DATA/annotations/instances_train2017.json" \
                --image-root "$DATA/train2017" --out "$REGIONS" --least-score 0.25 )
        fi
    fi
    run_training "$@"
}
