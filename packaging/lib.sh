# shellcheck shell=bash
# What setup.sh, test.sh and the demo share: names, messages, what is missing, which Python.
# Sourcing this file defines things and changes nothing; it never installs, starts or removes.

NBDMIRROR_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
NBDMIRROR_VENV=$NBDMIRROR_ROOT/.venv

# Debian 12 names. qemu-storage-daemon is in qemu-system-common, nbdfuse in libnbd-bin.
NBDMIRROR_PACKAGES=(
    nbdkit nbdkit-plugin-python                      # the engine's host
    python3 python3-venv python3-dev gcc libc6-dev   # the environment; crcmod is compiled
    libnbd-bin python3-libnbd nbd-client             # clients: nbdinfo, nbdcopy, nbdfuse, kernel
    fuse3 kmod util-linux e2fsprogs xfsprogs         # attach, mount, loop devices
    qemu-utils qemu-system-common fio                # clients and loads that we did not write
    iproute2 iputils-ping nftables                   # hosts and cuts on one machine
    haproxy                                          # a load balancer that asks the probe
    etcd-server                                      # an arbiter with a memory
    stress-ng                                        # load on every core, for the bench of failovers
    procps strace sqlite3                            # faults, and an application to mirror
    user-mode-linux                                  # a kernel of its own, for the OOM killer
)

say() { printf '%s: %s\n' "${NBDMIRROR_WHO:-nbdmirror}" "$*"; }
warn() { say "$*" >&2; }
is_root() { [ "$(id -u)" -eq 0 ]; }

# Variables of the caller's Python must not reach ours; -O would strip the assertions we rely on.
clean_env() {
    unset PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONSTARTUP PYTHONWARNINGS VIRTUAL_ENV
    # Else each of the many processes compiles the whole program: half of what its start costs.
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONNOUSERSITE=1
    case ":$PATH:" in *:/usr/sbin:*) ;; *) export PATH="$PATH:/usr/sbin:/sbin" ;; esac
}

# The packages of the list that are not installed, one per line.
missing_packages() {
    local have
    have=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${NBDMIRROR_PACKAGES[@]}" 2>/dev/null) || true
    printf '%s\n' "${NBDMIRROR_PACKAGES[@]}" | grep -vxF -f <(sed -n 's/^installed //p' <<<"$have")
    return 0
}

# MAJOR.MINOR of the Python inside nbdkit: the only one whose packages the engine can import.
embedded_version() {
    PATH=/usr/sbin:/usr/bin:/sbin:/bin nbdkit python --dump-plugin 2>/dev/null |
        sed -n 's/^python_version=\([0-9]*\.[0-9]*\).*/\1/p' || true
}

# Fills the array `contained` with a prefix that puts a command into its own process tree, where
# the end of the command ends everything it started, daemons and mounts included. Without the
# right to do so the prefix is empty: then 1 is returned.
set_contained() {
    local tree=(unshare --pid --fork --kill-child --mount-proc)
    is_root || tree=(unshare --user --map-current-user --pid --fork --kill-child --mount-proc)
    contained=()
    "${tree[@]}" true 2>/dev/null || return 1
    # bash as first process of the tree: it reaps what the tests leave orphaned.
    contained=("${tree[@]}" bash -c '"$@"; exit $?' contained)
}
