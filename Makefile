# run, test, bench, lint: each sets up what it needs. The only thing to have beforehand: python3 >= 3.10 with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test bench lint clean

run: $(VENV)/.run
	@$(BIN)/python webui.py $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m tests.browser --install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Suri needs Python 3.10 or newer; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=24.1"

# The stamp is written last: an installation that was interrupted is done again.
$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	@echo "Installing the libraries (once, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $(VENV)/.run $@
