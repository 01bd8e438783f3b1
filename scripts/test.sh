#!/usr/bin/env bash
# Runs the tests in the clone's own virtual environment. Arguments go to pytest; --slow adds the slow tests.
#   bash scripts/test.sh                          everything but the slow ones
#   bash scripts/test.sh --slow                   all
#   bash scripts/test.sh tests/open_clip -x       a part of them
#   bash scripts/test.sh -n 0 --pdb tests/ovseg   one after the other, for a debugger
# Files of tests are shared among as many processes as there are cores, 4 at most; slow tests, some of which measure, run
# one after the other. They run in the clone's folder, which paths in arguments are relative to; CLIPSELF_VENV, CLIPSELF_GOLDEN
# and PYTHON (see _venv.sh) are relative to the folder that the command is given in.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_python.sh"
from_here CLIPSELF_VENV CLIPSELF_GOLDEN PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv test

args=(-n "$("$PY" -c 'import os; print(min(os.cpu_count() or 1, 4))')" --dist loadfile)
for arg in "$@"; do
    if [ "$arg" = --slow ]; then args+=(-m "" -n 0); else args+=("$arg"); fi
done
# No test may need a network: a missing file must fail at once instead of waiting for the hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests start processes of their own: one thread each, lest they wait for one another on a busy machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$PY" -m pytest "${args[@]}"
