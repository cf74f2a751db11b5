#!/usr/bin/env bash
# Every promise checked by one command: the simulator, the mutants of its rules, system calls, power
# cuts and other accidents on real engines, changed inputs for every parser. Prints one table of what
# was checked; ends with an error at the first violation, and with the one command that shows it
# again.
#
#     packaging/prove.sh [--minutes N] [--json FILE] [--only CAMPAIGN]
#
# Needs root on Debian 12 (loop devices, mounts, strace). docs/proof.md says what each part does.
# Everything runs in a process tree of its own, in one directory; neither is left behind.
set -uo pipefail
# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
NBDMIRROR_WHO=prove
SPACE_NEEDED_MIB=1024

began_in=$PWD arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --json)   # from where the caller stands
            [ $# -gt 1 ] || { warn "--json FILE"; exit 2; }
            case $2 in /*) arguments+=("$1" "$2") ;; *) arguments+=("$1" "$began_in/$2") ;; esac
            shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done

# Loop devices outlive the tree that made them.
tidy_up() {
    losetup -n -O NAME,BACK-FILE 2>/dev/null | while read -r device file; do
        case $file in "$TMPDIR"/* | "/${TMPDIR##*/}"/*) losetup -d "$device" ;; esac
    done
    rm -rf -- "$TMPDIR"
}

is_root || { warn "needs root: loop devices, mounts, strace"; exit 1; }
cd "$NBDMIRROR_ROOT" || exit 1
clean_env
timeout --foreground --kill-after=10 900 bash packaging/setup.sh || { warn "setup failed"; exit 1; }
export PATH="$NBDMIRROR_VENV/bin:$PATH"
modprobe -q loop

# In memory where there is room: what is asked here is order and not speed, and a sync costs nothing.
place=/tmp
free_mib=$(df --output=avail -BM /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9)
[ "${free_mib:-0}" -lt "$SPACE_NEEDED_MIB" ] || place=/dev/shm
TMPDIR=$(mktemp -d "$place/nm.XXXXXX") || exit 1   # short: Unix sockets have 107 characters
export TMPDIR
trap tidy_up EXIT
trap 'exit 130' INT TERM

set_contained || { warn "no process tree of its own"; exit 1; }
commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=''
git diff --quiet HEAD 2>/dev/null || commit="$commit+"
"${contained[@]}" python -m tests.prove --commit "$commit" "${arguments[@]}"
