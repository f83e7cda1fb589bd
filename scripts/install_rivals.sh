#!/usr/bin/env bash
# Install the routers that `make bench` compares with into $1, a virtual environment of their own.
# HAProxy and nginx are compared with where the system has them (Debian, Ubuntu: apt-get install haproxy nginx).
set -euo pipefail
folder=${1:-$(dirname "$0")/../benchmarks/.rivals} python=${PYTHON:-python3}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "vllm-router==0.1.17" "sglang-router==0.3.2" "litellm[proxy]==1.106.2"
