#!/usr/bin/env bash
# The main job on one machine, with real parts only: a mirror of two nodes, ext4 and SQLite on it,
# the first engine killed under load, the second one takes over, the first one returns, the roles are
# swapped back, the images are compared. docs/demo.md describes it. Needs root on Debian 12.
# Everything runs in namespaces of its own (processes, mounts, network): when they end, nothing of
# it is left. The only trace on the machine meanwhile is one directory under $TMPDIR (or /tmp).
set -uo pipefail
# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
NBDMIRROR_WHO=demo
SPACE_NEEDED_MIB=3072   # two images of 1 GiB, and what must not be full beside them
LOOPS_FREE_S=5

INTERRUPT_LIMIT_S=30    # for the orderly end after a signal

directory='' tree='' interrupted=''

# Whether a loop device still has a file of ours behind it; of its path only the end is sure, because
# it was mounted in a namespace of the demo.
ours() {
    local file
    file=$(cat "/sys/block/${1##*/}/loop/backing_file" 2>/dev/null) || return 1
    [ "${file##*/}" = "${directory##*/}" ]
}

tidy_up() {
    local device until=$((SECONDS + LOOPS_FREE_S))
    if [ -n "$tree" ] && kill -0 "$tree" 2>/dev/null; then kill -KILL "$tree"; wait "$tree"; fi
    [ -n "$directory" ] || return 0
    # A loop device goes with its last user; looked at again here, so that nobody has to believe it.
    # In /sys, which answers even if the device is somebody else's by now, and stuck.
    while read -r device; do
        while ours "$device" && [ "$SECONDS" -lt "$until" ]; do sleep 0.05; done
        ! ours "$device" || warn "left behind: $device"
    done < <(cat "$directory/loops" 2>/dev/null)
    rm -rf -- "$directory"
}

is_root || { warn "needs root: namespaces, loop devices and mounts"; exit 1; }
clean_env
SECONDS=0
bash "$NBDMIRROR_ROOT/packaging/setup.sh" || { warn "setup failed"; exit 1; }
say "setup took $SECONDS s"
# Loaded from outside: inside, /dev is the same but modules are nobody's business.
modprobe -q loop; modprobe -q fuse; modprobe -q nbd

trap tidy_up EXIT
trap 'interrupted=$SECONDS' INT TERM HUP
directory=$(mktemp -d "${TMPDIR:-/tmp}/nbdmirror-demo.XXXXXX") || exit 1
free_mib=$(df --output=avail -BM -- "$directory" | tail -n 1 | tr -dc 0-9)
[ "$free_mib" -ge "$SPACE_NEEDED_MIB" ] || {
    warn "$directory has $free_mib MiB free, $SPACE_NEEDED_MIB are needed; set TMPDIR to another place"
    exit 1
}

[ -z "$interrupted" ] || exit 130
setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount --mount-proc --net \
    "$NBDMIRROR_VENV/bin/python" "$NBDMIRROR_ROOT/packaging/demo" "$directory" &
tree=$!
# A signal ends `wait`, not the tree. Its first process is Python: it tidies up and ends, and the
# tree with it; asked again, because before it has its handlers a signal does nothing to it.
while kill -0 "$tree" 2>/dev/null; do
    if [ -z "$interrupted" ]; then
        wait "$tree"
    elif [ $((SECONDS - interrupted)) -gt "$INTERRUPT_LIMIT_S" ]; then
        kill -KILL "$tree"
    else
        pkill -TERM -P "$tree"
        sleep 0.2
    fi
done
wait "$tree"
code=$?
tree=''
[ -z "$interrupted" ] || code=130
exit "$code"
