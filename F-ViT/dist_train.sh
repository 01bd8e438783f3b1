#!/usr/bin/env bash
# bash dist_train.sh CONFIG NUM_PROCESSES --work-dir DIR [--resume] [section.key=value ...]
# Processes, machines and interpreter: see scripts/_launch.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../scripts/_launch.sh"
launch_with "$here/train.py" 2 "dist_train.sh CONFIG NUM_PROCESSES --work-dir DIR [--resume] [section.key=value ...]" "$@"
