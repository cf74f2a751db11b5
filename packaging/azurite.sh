#!/usr/bin/env bash
# Installs Azurite, the store that the tests of the arbiter azure-blob ask, into .venv/azurite, each
# package checked against packaging/azurite/package-lock.json. Once done, later runs need no network.
# For tests alone; runs none of the packages' own scripts.

# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail
NBDMIRROR_WHO=azurite
DIRECTORY=$NBDMIRROR_VENV/azurite
SOURCE=$NBDMIRROR_ROOT/packaging/azurite

install_node() {
    ! { command -v node && command -v npm; } >/dev/null || return 0
    is_root || { warn "there is no Node.js; remedy: apt-get install nodejs npm"; return 1; }
    say "installing nodejs npm"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=120 update >/dev/null
    apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends nodejs npm >/dev/null
}

main() {
    local want
    want=$(cat "$SOURCE"/package{,-lock}.json "$NBDMIRROR_ROOT/packaging/azurite.sh" | sha256sum)
    ! { [ -e "$DIRECTORY/.stamp" ] && [ "$(<"$DIRECTORY/.stamp")" = "$want" ]; } || return 0
    install_node
    say "installing Azurite into .venv/azurite"
    rm -rf -- "$DIRECTORY"
    mkdir -p "$DIRECTORY"
    cp "$SOURCE"/package{,-lock}.json "$DIRECTORY/"
    npm --prefix "$DIRECTORY" ci --ignore-scripts --no-audit --no-fund --no-update-notifier \
        --loglevel=error >/dev/null
    printf '%s\n' "$want" >"$DIRECTORY/.stamp"
}

# One at a time, as setup.sh.
exec 9<"$NBDMIRROR_ROOT/packaging"
flock 9
main 9<&-
