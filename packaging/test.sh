#!/usr/bin/env bash
# Everything that must hold before a change is taken: lint, format, types, import contracts, tests.
# As root on Debian 12 nothing is left out. Without root it does what it can, lists the rest and
# ends with an error. Bounded in time; leaves no process, mount or file behind.
# Arguments go to pytest. A file of tests runs in one process; NBDMIRROR_TEST_JOBS says how many
# processes there are.
set -uo pipefail
# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
NBDMIRROR_WHO=test
LIMIT_S=1140          # of the whole run: under the 20 minutes that a CI job gets
PYTEST_RESERVE_S=30   # for pytest's own closing lines
JOBS=${NBDMIRROR_TEST_JOBS:-3}   # most tests wait for real processes, not for a core

failed=() not_done=()
cd "$NBDMIRROR_ROOT" || exit 1
clean_env
left() { echo $((LIMIT_S > SECONDS + 1 ? LIMIT_S - SECONDS : 1)); }

step() {
    local name=$1
    shift
    say "$name"
    timeout --foreground --kill-after=10 "$(left)" "$@" || failed+=("$name")
}

tidy_up() {
    losetup -n -O NAME,BACK-FILE 2>/dev/null | while read -r device file; do
        case $file in "$TMPDIR"/*) losetup -d "$device" ;; esac
    done
    rm -rf -- "$TMPDIR"
}

timeout --foreground --kill-after=10 900 bash packaging/setup.sh || { warn "setup failed"; exit 1; }
timeout --foreground --kill-after=10 "$(left)" bash packaging/azurite.sh ||
    { warn "Azurite, which the tests need, is not there"; exit 1; }
export PATH="$NBDMIRROR_VENV/bin:$PATH"

TMPDIR=$(mktemp -d /tmp/nm.XXXXXX) || exit 1   # short: Unix sockets have 107 characters
chmod 711 "$TMPDIR"   # tests try what a user without rights reaches; each closes its own directory
export TMPDIR
trap tidy_up EXIT
trap 'exit 130' INT TERM

mapfile -t sources < <(find nbdmirror cli plugin tests bench -name '*.py' -printf '%H\n' 2>/dev/null | sort -u)
step "ruff check" ruff check .
step "ruff format" ruff format --check .
step "mypy" mypy "${sources[@]}"
step "lint-imports" lint-imports --no-cache --no-logo

# One process then, because the list is made where the tests are collected.
is_root || { JOBS=0; not_done+=("tests that need root (listed by pytest below)"); }
mapfile -t missing < <(missing_packages)
[ "${#missing[@]}" -eq 0 ] || not_done+=("tests that need ${missing[*]}")
set_contained || not_done+=("no process tree of its own: a failing test may leave processes behind")
[ "${#failed[@]}" -eq 0 ] || warn "failed so far: $(IFS=,; echo "${failed[*]}")"
for line in "${not_done[@]}"; do warn "not done: $line"; done

# pytest comes last, so that its own closing line is the last word of a good run.
budget=$(($(left) - PYTEST_RESERVE_S))
NBDMIRROR_HYPOTHESIS=${NBDMIRROR_HYPOTHESIS:-ci} step "pytest" "${contained[@]}" \
    python -m pytest -q --color=no -n "$JOBS" --dist loadfile \
    --session-timeout="$((budget > 1 ? budget : 1))" "$@"

[ "${#failed[@]}" -eq 0 ] || { warn "failed: $(IFS=,; echo "${failed[*]}")"; exit 1; }
[ "${#not_done[@]}" -eq 0 ] || { warn "incomplete: ${#not_done[@]} part(s) not done, see above"; exit 3; }
