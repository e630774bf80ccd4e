#!/bin/sh
# sh activate.sh DIR: makes what this archive holds the active version in DIR, as `pbc deploy` does
# once it has copied. $PYTHON names the interpreter, where it is not to be looked for.
[ $# -eq 1 ] || { echo "usage: sh activate.sh DIR" >&2; exit 2; }
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit
wanted=$(cat "$here/python-version") || exit
facts=$(sh "$here/probe.sh" "$1" "${PYTHON:-}" "$wanted")
fact() { printf '%s\n' "$facts" | sed -n "s/^$1=//p"; }
python=$(fact python)
if [ "$(fact python_version)" != "$wanted" ]; then
    found=${python:+"$python is Python $(fact python_version)"}
    echo "error: ${found:-no Python was found}; needed is Python $wanted (\$PYTHON names one)" >&2
    exit 1
fi
printf '%s\n' "$facts" | exec "$python" -I "$here/board.py" "$here" "$1"
