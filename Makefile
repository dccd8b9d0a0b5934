# make demo: install, serve the bundled model, ask it two questions, print its figures. make test: install and run the whole test suite.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test check reference clean
.DELETE_ON_ERROR:

demo: $(VENV)/.serve
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/python -m tools.sizes
	$(BIN)/python -m tools.imports
	$(BIN)/python -m tools.reference --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

reference: $(VENV)/.dev
	$(BIN)/python -m tools.reference

# torch goes first and pinned, so that no other requirement chooses its build.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Presage needs Python 3.11 or later; name one with PYTHON=...")'
	@echo "installing into $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	touch $@

$(VENV)/.serve: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[serve]"
	touch $@

# The dev extra contains serve, so a later `make demo` has nothing left to install.
$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[dev]"
	touch $(VENV)/.serve $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
