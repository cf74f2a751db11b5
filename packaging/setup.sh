#!/usr/bin/env bash
# Makes everything ready on Debian 12: system packages (as root), .venv with the Python that
# nbdkit embeds, the locked dependencies, the project itself. Once done, later runs need neither
# network nor time. Run it, or source it to have .venv/bin first on PATH as well.
# Never touches anything outside the package manager and .venv.

# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

if [ "${BASH_SOURCE[0]}" != "$0" ]; then  # sourced: the work in a process of its own, no `exit`
    clean_env
    bash "$NBDMIRROR_ROOT/packaging/setup.sh" || return 1
    export VIRTUAL_ENV=$NBDMIRROR_VENV
    case ":$PATH:" in *":$NBDMIRROR_VENV/bin:"*) ;; *) export PATH="$NBDMIRROR_VENV/bin:$PATH" ;; esac
    return 0
fi

set -euo pipefail
NBDMIRROR_WHO=setup
STAMP=$NBDMIRROR_VENV/.stamp        # what the dependencies were made from
PROJECT_STAMP=$NBDMIRROR_VENV/.stamp-project

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -gt 0 ] || return 0
    if ! is_root; then
        warn "missing, and not root: ${missing[*]}"
        warn "remedy: apt-get install ${missing[*]}"
        return 0
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=120 update >/dev/null
    apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends \
        "${missing[@]}" >/dev/null
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -eq 0 ] || { warn "still missing: ${missing[*]}"; return 1; }
}

pip_locked() {
    "$NBDMIRROR_VENV/bin/python" -m pip --disable-pip-version-check --no-input install -qq \
        --require-hashes --no-build-isolation --use-pep517 \
        --only-binary :all: --no-binary crcmod "$@"
}

# crcmod without its extension works, 500 times slower, and says nothing.
check_crcmod() {
    "$NBDMIRROR_VENV/bin/python" -c 'import crcmod._crcfunext' && return 0
    warn "crcmod was installed without its C extension: is gcc there, and python3-dev?"
    return 1
}

# libnbd's Python module comes with the system's Python only; nothing else of it is let in.
link_libnbd() {
    local site file
    site=$("$NBDMIRROR_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for file in /usr/lib/python3/dist-packages/{nbd.py,libnbdmod.*.so}; do
        [ ! -e "$file" ] || ln -sfn "$file" "$site/"
    done
}

make_venv() {
    local python=$1 want=$2
    say "making .venv with $python"
    "$python" -m venv --clear "$NBDMIRROR_VENV"
    pip_locked -r "$NBDMIRROR_ROOT/requirements-build.lock"
    pip_locked -r "$NBDMIRROR_ROOT/requirements.lock"
    check_crcmod
    link_libnbd
    printf '%s\n' "$want" >"$STAMP"
}

install_project() {
    local plugin=$NBDMIRROR_ROOT/plugin/nbdmirror_plugin.py want=$1
    say "installing nbdmirror into .venv"
    "$NBDMIRROR_VENV/bin/python" -m pip --disable-pip-version-check --no-input install -qq \
        --no-index --no-deps --no-build-isolation -e "$NBDMIRROR_ROOT"
    # An editable install copies shared data, or leaves it out; a copy would go stale.
    mkdir -p "$NBDMIRROR_VENV/share/nbdmirror"
    ln -sfn "$plugin" "$NBDMIRROR_VENV/share/nbdmirror/nbdmirror_plugin.py"
    printf '%s\n' "$want" >"$PROJECT_STAMP"
}

stamp_fits() { [ -x "$NBDMIRROR_VENV/bin/python" ] && [ -e "$1" ] && [ "$(<"$1")" = "$2" ]; }

main() {
    local version python want project_want
    clean_env
    install_packages
    version=$(embedded_version)
    [ -n "$version" ] || { warn "nbdkit has no Python plugin; remedy: apt-get install nbdkit nbdkit-plugin-python"; return 1; }
    python=/usr/bin/python$version
    [ -x "$python" ] || { warn "nbdkit embeds Python $version, but $python is not there"; return 1; }
    # The path counts: a virtual environment does not survive a move.
    want=$(cd "$NBDMIRROR_ROOT" && { "$python" -V; pwd; cat requirements.lock requirements-build.lock packaging/setup.sh; } | sha256sum)
    stamp_fits "$STAMP" "$want" || make_venv "$python" "$want"
    project_want=$(sha256sum <"$NBDMIRROR_ROOT/pyproject.toml")
    stamp_fits "$PROJECT_STAMP" "$project_want" || install_project "$project_want"
    say "ready: Python $version in .venv"
}

# One at a time: the demo and the tests may start together.
exec 9<"$NBDMIRROR_ROOT/packaging"
flock 9
main 9<&-
