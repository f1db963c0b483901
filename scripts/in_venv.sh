#!/bin/sh
# Run Python in an environment that make keeps: sh scripts/in_venv.sh EXTRA ARGUMENTS...
#
# EXTRA is one of pyproject.toml, or "algoperf" for AlgoPerf's Python. From the environment: VENV,
# the folder that an extra is installed into first where it is missing (scripts/install.py), or
# "none" to use PYTHON as it is; PYTHON, the program that makes the folder; ALGOPERF_PYTHON, or
# ALGOPERF_VENV, the folder that it is in.
set -eu

home() { # the path $1 with its leading ~ as a shell would have it
    case $1 in
        "~" | "~/"*) printf '%s\n' "$HOME${1#"~"}" ;;
        *) printf '%s\n' "$1" ;;
    esac
}

need() { # that $1 is a program
    command -v "$1" >/dev/null && return
    echo "error: $1: no such program; $2" >&2
    exit 2
}

run() { # Python, in this shell's place
    case $1 in
        scripts/*.py) exec sh scripts/held.sh "$python" "$@" ;; # all of them listen, first thing
        *) exec "$python" "$@" ;;
    esac
}

extra=$1
shift
if [ "$extra" = algoperf ]; then
    python=$(home "${ALGOPERF_PYTHON:-${ALGOPERF_VENV:-.venv-algoperf}/bin/python}")
    need "$python" "run make algoperf-env, or set ALGOPERF_PYTHON="
    run "$@"
fi
python=$(home "${PYTHON:-python3}")
venv=$(home "${VENV:-.venv}")
need "$python" "PYTHON= names one, of Python 3.11 or newer"
if [ "$venv" != none ]; then
    sh scripts/held.sh "$python" -I scripts/install.py --python="$python" --venv="$venv" "$extra"
    python=$venv/bin/python
fi
run "$@"
