#!/usr/bin/env bash
# bash dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES --eval bbox|segm [section.key=value ...]
# Processes, machines and interpreter: see scripts/_launch.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../scripts/_launch.sh"
launch_with "$here/test.py" 3 "dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES --eval bbox|segm [section.key=value ...]" "$@"
