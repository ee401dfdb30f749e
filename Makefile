# Two commands: `make demo` and `make test`. Each creates .venv if it is missing.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUDGET ?= 9m

.PHONY: demo test lint types unit soak bench wheel docs report clean

demo: .venv/.installed
	$(BIN)/python -m kalmagrove compare --budget $(BUDGET) --out runs/demo

test: lint types unit

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

unit: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n 2

# 100 kills, every fault, and 20,000 hostile inputs that differ each time.
soak: .venv/.installed-dev
	KALMAGROVE_FAULT_KILLS=100 KALMAGROVE_FAULT_INPUTS=20000 KALMAGROVE_FAULT_FRESH=1 \
		KALMAGROVE_FAULT_SEED=$$(date +%s) $(BIN)/python -m pytest -q -n 2 tests/faults

bench: .venv/.installed
	$(BIN)/python benchmarks/step.py

# The wheel in an environment that has nothing else, away from the source.
wheel: .venv/bin/python
	rm -rf dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m venv dist/venv
	dist/venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	cd dist && venv/bin/kalmagrove train --preset kalmagrove-nano --tokens 20k --loop.context_length 64 --out run \
		&& venv/bin/kalmagrove generate run "import " --max_new_tokens 8 \
		&& venv/bin/kalmagrove reproduce --scale laptop --dry_run && echo "the wheel works"

docs: .venv/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

report: .venv/.installed
	$(BIN)/python -m kalmagrove report runs/demo

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv dist runs/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
