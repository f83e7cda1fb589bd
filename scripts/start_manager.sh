#!/usr/bin/env bash
# Without Ray: the manager alone, in the foreground. It listens on the control socket of its home, and with MANAGER_HOST on
# TCP too (MANAGER_PORT, 9000), where workers may register with the cluster token.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ ! -x "$bin/modelpool" ] || PATH="$bin:$PATH"
exec python -m modelpool.manager
