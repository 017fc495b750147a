# make demo   train bn, sn and nf EfficientNet-B0 on real digits, plot, export (runs/demo)
# make test   the tests (a few minutes)
# make bench  race the peers, training and inference (half an hour on a quiet machine)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test slow lint bench manifest clean

demo: $(VENV)/.ready
	$(BIN)/python training/demo.py --out runs/demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile  # a file's fixtures are made once

slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --durations=200

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch and timm are peers only: pip install them into the environment to race against them.
bench: $(VENV)/.ready-dev
	$(BIN)/python training/benchmark.py
	$(BIN)/python training/tables.py

# Count every model anew, after a change of the architectures.
manifest: $(VENV)/.ready
	$(BIN)/python -m nfzoo.models.manifest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev,jax]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
