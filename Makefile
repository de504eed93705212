# Every target makes the virtual environment it needs; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WITH_EXTRAS := $(VENV)/.with-extras
LOWEST := .venv-lowest
LOWEST_INSTALLED := $(LOWEST)/.installed
# What the names of torch, transformers and typer carry: training, resume, parity with one process, search, verbs.
LOWEST_TESTS := tests/unit/test_internals.py tests/unit/train tests/unit/search/test_search.py \
	$(addprefix tests/unit/cli/test_,search_verb.py console.py outputs.py) \
	tests/numerics/test_certificate.py $(addprefix tests/distributed/test_,trainer_resume.py compile.py)

TWO_AT_ONCE := -n 2 --dist loadfile

.PHONY: quickstart gpu test test-all test-lowest lint check format clean

# The whole promise on this machine: profile, search, train, resume under another plan, generate.
quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/galvatron run examples/quickstart.toml

# Ten minutes on one GPU (on a CPU small): right, as predicted, and how fast beside others?
gpu: $(INSTALLED)
	mkdir -p runs
	$(BIN)/python -m benchmarks.gpu --out runs/gpu.json

# What CI runs.  Two files at once: most tests of one keep a core busy, and worlds of processes wait for each other.
test: $(WITH_EXTRAS)
	$(BIN)/pytest $(TWO_AT_ONCE) -m "not slow and not gpu and not multi_gpu"

# Everything; tests that need a GPU skip themselves where there is none.
test-all: $(WITH_EXTRAS)
	$(BIN)/pytest $(TWO_AT_ONCE)

# The lowest versions that pyproject.toml admits, in an environment of their own (5 GB; Python 3.11 or 3.12).
test-lowest: $(LOWEST_INSTALLED)
	$(LOWEST)/bin/python -m pytest $(TWO_AT_ONCE) -m "not slow and not gpu and not multi_gpu" $(LOWEST_TESTS)

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
	rm -rf $(VENV) $(LOWEST) runs dist

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# torchao warns at every start of transformers, so it comes with the tests alone; peft for theirs of adapters
$(WITH_EXTRAS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[dev,fp8,lora]'
	touch $@

$(LOWEST_INSTALLED): pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet -r tests/lowest.txt -e '.[train,vision]'
	touch $@
