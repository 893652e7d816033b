# What CI runs is what you type. Needs Python 3.11 or newer, pip and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check tables bench clean

.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade -c constraints.txt -e '.[run,eval]'
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.run  ## converts the pocket teacher twice and shows both tables
	$(BIN)/recipelin run pocket/lolcats
	$(BIN)/recipelin run pocket/absolute

test: .venv/.dev  ## the whole test suite
	$(BIN)/python -m pytest

check: .venv/.dev  ## style, types, and every recipe
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/recipelin check recipes

tables: .venv/.run  ## makes every table anew from results/records and compares it with the committed one
	$(BIN)/recipelin table results/tables --check

bench: .venv/.dev  ## speed and memory of the operators against their references
	$(BIN)/python kernels/bench/hybrid.py
	$(BIN)/python kernels/bench/weight_transfer.py

clean:
	rm -rf .venv runs
