# `make generate` and `make test` do all the set-up; they need Python 3.11 or newer with venv, and nothing else.
#
#   make generate MODEL=smollm2              an English text by SmolLM2-135M-Instruct, or by any hub id or folder
#   make generate PYTHON=python3.12          another Python
#   make generate TORCH="torch==2.12.1"      another build of torch; so does a PIP_CONSTRAINT file that names torch
#
# A torch that $(PYTHON) has already is used as it is. Otherwise torch is installed first and pinned, because the newest
# build may bring gigabytes of libraries for GPUs.

PYTHON ?= python3
VENV ?= .venv
MODEL ?=
SMOLLM2 := HuggingFaceTB/SmolLM2-135M-Instruct
TORCH ?= $(shell grep -qis '^torch *[=<>~!@]' $(PIP_CONSTRAINT) /dev/null && echo torch || echo torch==2.13.0)

BIN := $(VENV)/bin
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
HAS_PYTHON := import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, not {sys.version}")

# The bundled model is too small for several threads, and threads that spin slow each other down on shared cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

# Two processes with one half of the tests each, so that what a module sets up is seldom set up twice; who is done early
# takes over some of the other's.
IN_TWO := -n 2 --dist worksteal

# The site of the pages in docs/; a link or an anchor that leads nowhere is an error.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: generate test test-all docs clean

generate: $(VENV)/generate.stamp
	$(BIN)/kara-hf generate $(if $(MODEL),--model $(if $(filter smollm2,$(MODEL)),$(SMOLLM2),$(MODEL)))

test: $(VENV)/test.stamp
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(SITE)
	$(BIN)/python -m pytest $(IN_TWO)

# Slow tests too, among them the sweep over every causal LM class of Transformers; drawn tests draw more examples.
test-all: test
	$(BIN)/python -m pytest $(IN_TWO) -m "slow or hypothesis" --hypothesis-profile thorough

docs: $(VENV)/test.stamp
	$(SITE)
	@echo "Open site/index.html"

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.stamp:
	@$(PYTHON) -c '$(HAS_PYTHON)'
	@echo "Creating $(VENV)"
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(VENV)/generate.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@ $(VENV)/generate.stamp
