#!/usr/bin/env bash
# The worker of this machine, in the foreground. WORKER_ID, WORKER_HOST, WORKER_PORT, MANAGER_URL, PUBLIC_URL and
# MODELPOOL_TOKEN say who it is and whom it works for; arguments are those of `modelpool worker`.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ ! -x "$bin/modelpool" ] || PATH="$bin:$PATH"
exec modelpool worker "$@"
