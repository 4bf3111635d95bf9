# `make demo` sets up and runs the main job; `make test` sets up and passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow lint types docs clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/fanbu run recipes/demo.yaml

test: setup lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs build benchmarks/work
