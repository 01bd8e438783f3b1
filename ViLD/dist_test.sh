#!/usr/bin/env bash
# bash dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES --eval bbox|segm [section.key=value ...]
# One process per GPU, or CPU processes where there is none. Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and
# MASTER_PORT) on each. PYTHON names another interpreter than that of the clone's .venv.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ $# -ge 3 ] || { echo "usage: bash dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES --eval bbox|segm [section.key=value ...]" >&2; exit 2; }
config="$1" checkpoint="$2" processes="$3"
shift 3
source "$here/../F-ViT/tools/_launch.sh"
launch "$processes" "$here/test.py" "$config" "$checkpoint" "$@"
