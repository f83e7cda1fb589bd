#!/usr/bin/env bash
# Without Ray: the gateway alone, in the foreground, beside a manager of the same home (MODELPOOL_HOME). ROUTER_HOST and
# ROUTER_PORT (or SERVE_HOST, SERVE_PORT) say where it listens.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ ! -x "$bin/modelpool" ] || PATH="$bin:$PATH"
exec python -m modelpool.gateway
