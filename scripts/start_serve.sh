#!/usr/bin/env bash
# The pool on a Ray cluster: the manager actor, and a gateway on every node. RAY_ADDRESS, RAY_WORKING_DIR, SERVE_HOST and
# SERVE_PORT say where; arguments are those of `modelpool deploy`. `modelpool undeploy` ends it.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ ! -x "$bin/modelpool" ] || PATH="$bin:$PATH"
exec modelpool deploy "$@"
