#!/usr/bin/env bash
# The bench of whole systems: bash bench/run.sh [--quick] [--json FILE] [--help]
# Sets up like the tests do, runs bench/run.py in a process tree of its own, and leaves no process
# and no file behind. Ends with 1 when a floor is broken, 2 when something broke.
set -uo pipefail
# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../packaging/lib.sh"
NBDMIRROR_WHO=bench

json=() rest=()
while [ $# -gt 0 ]; do  # the report's path is the caller's, the bench runs elsewhere
    case $1 in
    --json) [ $# -gt 1 ] || { warn "--json needs a file"; exit 2; }
            json=(--json "$(realpath -m -- "$2")"); shift ;;
    --json=*) json=(--json "$(realpath -m -- "${1#--json=}")") ;;
    *) rest+=("$1") ;;
    esac
    shift
done

cd "$NBDMIRROR_ROOT" || exit 2
clean_env
bash packaging/setup.sh >&2 || { warn "setup failed"; exit 2; }
set_contained || warn "no process tree of its own: a crash of the bench may leave processes behind"

clear_away() { rm -rf -- "${sockets:-}" "${ram:-}" "${disk:-}"; rmdir tmp 2>/dev/null; }
trap clear_away EXIT
trap 'exit 130' INT TERM
mkdir -p tmp
sockets=$(mktemp -d /tmp/nmb.XXXXXX) || exit 2   # short: Unix sockets have 107 characters
ram=$(mktemp -d /dev/shm/nmb.XXXXXX) || exit 2
disk=$(mktemp -d "$NBDMIRROR_ROOT/tmp/bench.XXXXXX") || exit 2

PYTHONPATH=$NBDMIRROR_ROOT "${contained[@]}" "$NBDMIRROR_VENV/bin/python" -m bench.run \
    --tmpfs "$ram" --disk "$disk" --sockets "$sockets" "${json[@]}" "${rest[@]}"
