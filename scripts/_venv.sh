# Sourced by the entry points: one virtual environment, .venv in the clone, made and filled once.
#   source scripts/_venv.sh; ensure_venv [EXTRA]     EXTRA: a key of setup.py's extras_require, such as test
# Afterwards $PY is the environment's Python, whatever environment is active. CLIPSELF_VENV names another folder, PYTHON the
# interpreter that a new environment is made from (default python3).

source "$(dirname "${BASH_SOURCE[0]}")/_python.sh"

ensure_venv() {
    local extra="${1:-}" base root venv stamp state
    from_here CLIPSELF_VENV
    if [ -n "${PYTHON:-}" ]; then named_python; fi
    base="${PYTHON:-python3}"
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${CLIPSELF_VENV:-$root/.venv}"
    PY="$venv/bin/python"
    if [ ! -x "$PY" ]; then
        command -v "$base" >/dev/null || {
            echo "error: $base is not installed; install Python 3.10 or newer, or name it with PYTHON=/path/to/python3" >&2
            return 2
        }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: $base is $("$base" -V 2>&1), this needs Python 3.10 or newer; name one with PYTHON=/path/to/python3" >&2
            return 2
        }
        echo "Making the virtual environment $venv"
        "$base" -m venv "$venv" || {
            echo "error: '$base -m venv' failed; install the venv module (Debian and Ubuntu: apt install python3-venv)" >&2
            return 2
        }
    elif [ -n "${PYTHON:-}" ] && [ ! "$PYTHON" -ef "$PY" ]; then
        echo "note: $PY runs: PYTHON is what a new environment is made from; name a new one with CLIPSELF_VENV=FOLDER" >&2
    else
        note_active "$venv"
    fi
    # The stamp holds what was installed, and from which folder: a changed requirement or a moved clone installs again.
    state="$root $(cat "$root/setup.py" "$root/requirements.txt" | cksum)"
    stamp="$venv/.installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
        echo "Installing the project into $venv (a few minutes the first time)"
        install_project "$root" "$extra" || {
            echo "error: the installation failed; the lines above say why (a network to the package index is needed once)" >&2
            return 2
        }
        echo "$state" >"$stamp"
    fi
}

install_project() {
    local root="$1" extra="$2"
    "$PY" -m pip install -q --disable-pip-version-check -e "$root${extra:+[$extra]}"
}
