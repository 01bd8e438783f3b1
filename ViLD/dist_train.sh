#!/usr/bin/env bash
# bash dist_train.sh CONFIG NUM_PROCESSES --work-dir DIR [--resume] [section.key=value ...]
# One process per GPU, or CPU processes where there is none. Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and
# MASTER_PORT) on each. PYTHON names another interpreter than that of the clone's .venv.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ $# -ge 2 ] || { echo "usage: bash dist_train.sh CONFIG NUM_PROCESSES --work-dir DIR [--resume] [section.key=value ...]" >&2; exit 2; }
config="$1" processes="$2"
shift 2
source "$here/../F-ViT/tools/_launch.sh"
launch "$processes" "$here/train.py" "$config" "$@"
