# Sourced by what starts the detectors' programs: dist_train.sh and dist_test.sh of each, and pipelines.
#
# One process per GPU, or CPU processes where there is none. Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and
# MASTER_PORT) on each. PYTHON names another interpreter than that of the clone's .venv.

# launch_with PROGRAM N "USAGE" ARGUMENTS...: the program, in as many processes as the Nth argument says, with the others.
launch_with() {
    local program="$1" place="$2" usage="$3"
    shift 3
    case "${1:-}" in -h | --help) echo "usage: bash $usage"; exit 0 ;; esac
    [ $# -ge "$place" ] || { echo "usage: bash $usage" >&2; exit 2; }
    launch "${!place}" "$program" "${@:1:place-1}" "${@:place+1}"
}

# launch PROCESSES PROGRAM ARGUMENTS...
launch() {
    local processes="$1" program="$2" root python cores
    shift 2
    case "$processes" in
        "" | *[!0-9]* | 0) echo "error: the number of processes is \"$processes\"; give 1 or more" >&2; exit 2 ;;
    esac
    root="$(cd "$(dirname "$program")/.." && pwd)"
    if [ -n "${CLIPSELF_VENV:-}" ] && [ -z "${PYTHON:-}" ] && [ ! -x "$CLIPSELF_VENV/bin/python" ]; then
        echo "error: CLIPSELF_VENV: there is no $CLIPSELF_VENV/bin/python" >&2; exit 2
    fi
    python="${PYTHON:-${CLIPSELF_VENV:-$root/.venv}/bin/python}"
    [ -x "$python" ] || python="$(command -v "$python" || command -v python3)"
    export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
    cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}"
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        exec "$python" "$program" "$@"
    elif [ "${NNODES:-1}" = 1 ]; then
        exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" -- "$program" "$@"
    else
        exec "$python" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK}" \
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR}" --master_port "${MASTER_PORT:-29500}" \
            --nproc_per_node "$processes" -- "$program" "$@"
    fi
}
