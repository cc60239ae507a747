# Two commands on a fresh machine: `make demo`, `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint types figures clean

demo: $(VENV)/.demo          ## stock and reduced answers of the embedded model, side by side, and pictures of what was kept
	$(BIN)/mmcompress demo

test: lint types            ## everything CI checks
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy mmcompress adapters

figures: $(VENV)/.dev       ## the README's table of accuracies, about half an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/mmcompress eval pico --methods all,globalcom2:paper_code=true --keep 0.1,0.25,0.5 \
		--n 1000 --dtype bfloat16 --positions closed --out out/closed
	OMP_NUM_THREADS=1 $(BIN)/mmcompress eval pico --methods all,globalcom2:paper_code=true --keep 0.1,0.25,0.5 \
		--n 1000 --dtype bfloat16 --positions original --out out/original

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("mmcompress needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
