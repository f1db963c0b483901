#!/bin/sh
# Run a script of ours: sh scripts/held.sh PYTHON scripts/NAME.py ARGUMENTS...
#
# SIGINT and SIGTERM are held back until the script listens (algoperf_shampoo/interrupt.py), because
# Python answers a Ctrl-C while it starts with a traceback. An env that cannot do that (before
# coreutils 8.31, or another's) runs it as it is.
hold=--block-signal=INT,TERM
if env "$hold" true 2>/dev/null; then
    exec env "$hold" "$@"
fi
exec "$@"
