# Two commands do everything: `make quickstart` and `make test`.
# ARGS goes to the command that a target runs: make quickstart ARGS="--rounds 20"
# TORCH goes to `pip install`, before all else: make quickstart TORCH="torch==2.13.0 --index-url URL"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check
FRESH := $(VENV)/fresh
SOURCES := pyproject.toml constraints.txt

# The shell splits $$TORCH into words and takes the > of torch>=2.11 for no redirection.
export TORCH

.PHONY: help quickstart test slow lint constraints clean

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

quickstart: $(VENV)/.run ## a federated run on real data (ARGS: flags of the recipe)
	$(VENV)/bin/python recipes/quickstart.py $(ARGS)

test: $(VENV)/.dev ## the tests (ARGS: flags of pytest)
	$(RUN) pytest $(ARGS)

slow: $(VENV)/.dev ## the tests that are too long for every day
	$(RUN) pytest -m slow --timeout 3600 $(ARGS)

lint: $(VENV)/.dev ## format, lint, types
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

constraints: ## constraints.txt from the newest versions, in a fresh environment
	$(MAKE) VENV=$(FRESH) $(FRESH)/.torch
	$(FRESH)/bin/python -m pip install -e ".[dev]"
	sed '/^[^#]/d' constraints.txt > $(FRESH)/constraints.txt
	$(FRESH)/bin/python -m pip freeze --exclude-editable \
	  | grep -Eiv '^(torch|triton|nvidia|cuda|setuptools)' >> $(FRESH)/constraints.txt
	mv $(FRESH)/constraints.txt constraints.txt
	rm -rf $(FRESH)

clean: ## removes the environment and the caches, never runs/
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamps: what they stand for is installed, and a second call installs nothing.

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "vecfl needs Python 3.11 or newer, and $(PYTHON) is older or missing:" \
	    "make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A TORCH that was given and is not the one installed replaces it.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat $(VENV)/.torch 2> /dev/null))
.PHONY: $(VENV)/.torch
endif
endif

$(VENV)/.torch: | $(VENV)/bin/pip
	@echo "pip install $$TORCH"; $(PIP) install --upgrade $$TORCH
	@echo "$$TORCH" > $@

$(VENV)/.run: $(VENV)/.torch $(SOURCES)
	$(PIP) install -e ".[data,plot]" -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) install -e ".[dev]" -c constraints.txt
	@touch $(VENV)/.run $@
