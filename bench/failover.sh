#!/usr/bin/env bash
# How long a failover takes, 30 runs of each fault: docs/benchmarks.md. Root; about 8 minutes.
# Arguments: --runs N, --stress SECONDS, --json FILE.
set -uo pipefail
# shellcheck source=packaging/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../packaging/lib.sh"
NBDMIRROR_WHO=bench
is_root || { warn "needs root: namespaces"; exit 2; }
cd "$NBDMIRROR_ROOT" || exit 2
clean_env
bash packaging/setup.sh >&2 || { warn "setup failed"; exit 2; }
set_contained || warn "no process tree of its own: a crash of the bench may leave processes behind"
PYTHONPATH=$NBDMIRROR_ROOT "${contained[@]}" "$NBDMIRROR_VENV/bin/python" -m bench.failover "$@"
