# Sourced by what starts the detectors' programs: dist_train.sh and dist_test.sh of each, and pipelines.
#
# One process per GPU, or CPU processes where there is none. Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and
# MASTER_PORT) on each. PYTHON and CLIPSELF_VENV name another interpreter than that of the clone's .venv: see _python.sh. Relative
# paths are meant from the folder that the command is given in.

source "$(dirname "${BASH_SOURCE[0]}")/_python.sh"

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
    local processes="$1" program="$2" root cores
    shift 2
    case "$processes" in
        "" | *[!0-9]* | 0) echo "error: the number of processes is \"$processes\"; give 1 or more" >&2; exit 2 ;;
    esac
    root="$(cd "$(dirname "$program")/.." && pwd)"
    choose_python "$root"
    export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
    cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}"
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        exec "$PYTHON" "$program" "$@"
    elif [ "${NNODES:-1}" = 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -- "$program" "$@"
    else
        exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK}" \
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR}" --master_port "${MASTER_PORT:-29500}" \
            --nproc_per_node "$processes" -- "$program" "$@"
    fi
}
