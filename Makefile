# Every target sets up .venv first when that is needed. `make <target> PYTHON=python3` uses that interpreter as it is:
# no virtual environment, no network.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)

.PHONY: setup train test sweep lint bench gpu
setup: $(READY)
	@command -v bwrap >/dev/null || echo "note: bubblewrap is not installed; the ftrl environment needs it (Debian: apt-get install bubblewrap)"

# torch first, by its pin: a range would admit other builds.
$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[train,dev]'
	touch $@

train: setup
	$(PYTHON) -m pact.cli train configs/toybox.yaml

test: setup
	$(PYTHON) -m pytest

# 10,000 random cases of the head kernels; most of an hour on two cores without a GPU.
sweep: setup
	$(PYTHON) tests/pact_kernels/head_sweep.py --cases 10000

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: setup
	$(PYTHON) -m pytest benchmarks/prefix_tree.py benchmarks/head.py --benchmark-only
	$(PYTHON) benchmarks/head.py
	$(PYTHON) benchmarks/one_pass.py --shape cpu

# Needs torch, triton and pytest alone, this package not installed. Every kernel for correctness, then the benchmarks.
gpu: setup
	$(PYTHON) -m pytest tests/gpu tests/pact_kernels/test_linear_logprob_triton.py tests/pact_kernels/test_cotrain_loss_triton.py
	PYTHONPATH=. $(PYTHON) benchmarks/head.py
