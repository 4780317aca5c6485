# make quickstart   from a fresh clone to a trained Shakespeare model, and samples from it
# make test         all tests; `make test-quick`: the fast lane, as `pytest` alone
# make lint         ruff and mypy
# make docs         the documentation as a site in site/; fails for a broken link
# Each makes its environment first, if need be. SOURCE=FILE: the text that quickstart learns.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A change of what the environment is made from makes a new one.
READY = $(VENV)/.ready-$(shell cat requirements/*.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: install quickstart test test-quick lint docs

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
	$(PYTEST) -m ""

test-quick: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site has an environment of its own: it needs neither torch nor Ray.
DOCS = .venv-docs
DOCS_READY = $(DOCS)/.installed-$(shell cksum < requirements/docs.txt | cut -d' ' -f1)

$(DOCS_READY):
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/docs.txt
	touch $@

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
