# Every target makes the virtual environment it needs; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-all lint check format clean

# The whole promise on this machine: profile, search, train, resume under another plan, generate.
quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/galvatron run examples/quickstart.toml

# What CI runs; a few minutes on two cores.
test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu and not multi_gpu"

# Everything; tests that need a GPU skip themselves where there is none.
test-all: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) runs dist

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
