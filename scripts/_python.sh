# Sourced by all scripts: which Python runs, and which folder relative paths are meant from.
#
#   PYTHON         the interpreter, by its path or its name (of scripts that make an environment: see _venv.sh)
#   CLIPSELF_VENV  folder of a virtual environment, whose interpreter it is then
# Without either it is that of .venv in the clone; where there is none "python", that of the environment that is active.

# from_here VARIABLE...: a relative path in one of these is meant from the folder that the command is given in. Before any cd.
from_here() {
    local name value
    for name in "$@"; do
        value="${!name:-}"
        case "$value" in
            "" | /*) ;;
            .) printf -v "$name" '%s' "$PWD" ;;
            */*) printf -v "$name" '%s' "$PWD/${value#./}" ;;
            *) [ "$name" = PYTHON ] || printf -v "$name" '%s' "$PWD/$value" ;;  # one without a folder is looked for
        esac
    done
}

# named_python: PYTHON, which is set, as the path of an interpreter; exit status 2 where there is none.
named_python() {
    local found
    from_here PYTHON
    found="$(type -P -- "$PYTHON")" || {
        echo "error: PYTHON: there is no $PYTHON; give the path of an interpreter, such as PYTHON=\"\$(command -v python3)\"" >&2
        exit 2
    }
    PYTHON="$found"
}

# note_active FOLDER: says so where an environment is active and it is not this one, which runs.
note_active() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -n "$active" ] && [ ! "$active" -ef "$1" ]; then
        echo "note: the environment $1 runs, not $active, which is active: see \"Which Python runs\" in README.md" >&2
    fi
}

# choose_python CLONE: sets PYTHON to the interpreter that runs the programs; exit status 2 where a named one is not there.
choose_python() {
    from_here CLIPSELF_VENV
    if [ -n "${PYTHON:-}" ]; then
        named_python
    elif [ -n "${CLIPSELF_VENV:-}" ]; then
        PYTHON="$CLIPSELF_VENV/bin/python"
        if [ ! -x "$PYTHON" ]; then echo "error: CLIPSELF_VENV: there is no $PYTHON" >&2; exit 2; fi
    elif [ -x "$1/.venv/bin/python" ]; then
        PYTHON="$1/.venv/bin/python"
        note_active "$1/.venv"
    else
        PYTHON="$(type -P python || type -P python3)" || {
            echo "error: there is no python; name one with PYTHON=/path/to/python" >&2
            exit 2
        }
    fi
}
