# make demo   train, compare and sample small models on real text (creates its own environment first)
# make test   format check, lint, import contract, sentences, types and the whole test suite
# make format rewrite the sources in the project's style
# make figures  draw the pictures of the docs, from stored measurements; FRESH=1 measures all of them anew (half an hour)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format figures env clean
.DELETE_ON_ERROR:

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,hf,dev]'
	touch $@

demo: env
	$(BIN)/python -m recurformer demo --out demo

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell src tests docs benchmarks runs tools README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/prose.py
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: env
ifdef FRESH
	rm -r docs/figures/data
	$(BIN)/python -m recurformer demo --out demo
	$(BIN)/python docs/figures/demo.py demo
endif
	$(BIN)/python docs/figures/layer.py
	$(BIN)/python docs/figures/algorithm.py
	$(BIN)/python docs/figures/emulation.py
	$(BIN)/python docs/figures/recurrence.py
	$(BIN)/python docs/figures/decode.py
	$(BIN)/python docs/figures/retrofit.py
	$(BIN)/python runs/results/report.py

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache
