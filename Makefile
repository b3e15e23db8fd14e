# make train: everything from a fresh machine with Python 3.11 to a trained policy.  make test: the checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test clean

train: $(VENV)/installed
	$(BIN)/python train_agent.py --config configs/pan_tight.yaml

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
