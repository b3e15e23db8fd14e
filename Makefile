# make train: from a fresh machine with Python 3.11 or newer to a trained policy.  make test: all checks.
# make docs: the documentation, in docs/_build/html.  make clean: remove what these have made, run folders excepted.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test docs clean

train: $(VENV)/installed
	$(BIN)/python train_agent.py --config configs/pan_tight.yaml

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"
	touch $@

$(VENV)/installed-docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/sphinx-build || $(BIN)/pip install -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/generated build dist *.egg-info .pytest_cache .ruff_cache
