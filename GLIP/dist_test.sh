#!/usr/bin/env bash
# bash dist_test.sh CHECKPOINT NUM_PROCESSES [--config CONFIG] [section.key=value ...]; see dist_train.sh for the rest.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ $# -ge 2 ] || { echo "usage: bash dist_test.sh CHECKPOINT NUM_PROCESSES [--config CONFIG] [section.key=value ...]" >&2; exit 2; }
checkpoint="$1" processes="$2"
shift 2
source "$here/../F-ViT/tools/_launch.sh"
launch "$processes" "$here/test.py" "$checkpoint" "$@"
