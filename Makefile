# Every target sets up what it needs; the second time that costs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The ordinary vLLM where there is an NVIDIA driver, the CPU build elsewhere.
ENGINE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.ready-$(ENGINE)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test check soak bench rivals clean

setup: $(STAMP)

$(STAMP): requirements/$(ENGINE).lock pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV) $(ENGINE)
	@touch $@

demo: setup
	@$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/python -m pytest -m "not soak" --numprocesses=2 --no-loadscope-reorder --durations=15

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: setup
	$(BIN)/python -m pytest tests/soak tests/e2e tests/contract -m soak -s

bench: setup
	$(BIN)/python -m benchmarks.gateway

rivals:
	PYTHON="$(PYTHON)" bash scripts/install_rivals.sh benchmarks/.rivals

clean:
	rm -rf $(VENV) benchmarks/.rivals build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
