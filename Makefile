# make quickstart   from a fresh clone to a trained Shakespeare model, and samples from it
# make test         all tests; `make test-quick`: those without Ray
# make lint         ruff and mypy
# Each makes .venv first, if need be. SOURCE=FILE: the text that quickstart learns.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The environment is made anew when what it is made from has changed.
READY = $(VENV)/.ready-$(shell cat requirements/*.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: install quickstart test test-quick lint

install: $(READY)

$(READY):
	$(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python sh requirements/install.sh dev
	rm -f $(VENV)/.ready-*
	touch $@

quickstart: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" sh quickstart.sh $(if $(SOURCE),"$(SOURCE)")

# Two processes, in the order of the tree: while one test waits for its Ray, another works.
PYTEST = $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

test-quick: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
