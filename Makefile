# `make demo` and `make test` set themselves up on a fresh machine: Python 3.10 to 3.13 with venv is all they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PROTO := lmdeploy_slo/v1/inference.proto
PYTHON_VERSIONS := 3.10 3.11 3.12 3.13

.PHONY: demo test test-fast lint format types proto wheel clean

# A generated workload, FCFS and annealing side by side.
demo: $(READY)
	$(BIN)/python -m lmdeploy_slo demo

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each declared version of Python; the oldest is what pyproject.toml names.
types: $(READY)
	for version in $(PYTHON_VERSIONS); do $(BIN)/mypy --python-version $$version || exit 1; done

# Regenerates the committed code of lmdeploy_slo/v1; tests/test_proto.py fails where the two differ.
proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/$(PROTO)

wheel: $(READY)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lmdeploy_slo tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Once, and again when the dependencies change.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	touch $(READY)
