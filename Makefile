# `make demo` and `make test` set themselves up on a fresh machine: Python 3.10 to 3.13 with venv is all they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PROTO := lmdeploy_slo/v1/inference.proto
PYTHON_VERSIONS := 3.10 3.11 3.12 3.13

LMDEPLOY_BIN := .venv-lmdeploy/bin
LMDEPLOY_READY := .venv-lmdeploy/.ready
LMDEPLOY_NEEDS := tests/with_lmdeploy/requirements.txt

INTEROP_READY := .venv-interop/.ready
INTEROP_NEEDS := tests/interop/requirements.txt

# Of the long run of `make fuzz`: how many inputs, and which.
INPUTS ?= 1000000
SEED ?= 1
SECONDS ?= 60
FUZZ_READY := .venv-fuzz/.ready

.PHONY: demo test test-fast test-nightly test-interop fuzz fuzz-guided test-faults test-lmdeploy test-gpu bench-planner bench-paper bench-placement plot-planner lint format types proto wheel lock locked dependencies audit clean bench-lengths

# A generated workload, FCFS and annealing side by side.
demo: $(READY)
	$(BIN)/python -m lmdeploy_slo demo

test: $(READY)
	$(BIN)/python -m pytest -m "not nightly"

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not nightly"

# What takes minutes: 20,000 calls half of which are aborted, 1,000 histories of faults, 5 minutes of overload.
test-nightly: $(READY)
	$(BIN)/python -m pytest -m nightly

# Against the real LMDeploy, on the CPU, in an environment of its own (1.9 GB). Where pip's index has no CPU build of
# torch, name one that has: make test-lmdeploy PIP_OPTIONS="--extra-index-url URL" (see pytorch.org, "Get started").
test-lmdeploy: $(LMDEPLOY_READY)
	$(LMDEPLOY_BIN)/python -m pytest tests/with_lmdeploy

# Engines that stall and crash, clocks that jump, planners that raise: a thousand histories in virtual time.
test-faults: $(READY)
	$(BIN)/python tests/fault_simulation.py --seeds 1000

# The server of .venv and a client of another make, grpclib, in an environment of its own that has no grpcio.
test-interop: $(READY) $(INTEROP_READY)
	.venv-interop/bin/python -m pytest --confcutdir=tests/interop tests/interop

# Nightly: SEED=n for other inputs; goes on where it was interrupted (.fuzz/progress.json).
fuzz: $(READY)
	$(BIN)/python -m pytest -q tests/fuzz --hypothesis-profile=explore
	$(BIN)/python tests/fuzz/runner.py --inputs $(INPUTS) --seed $(SEED)

# The same targets under atheris, SECONDS for each, in an environment of its own.
fuzz-guided: $(FUZZ_READY)
	.venv-fuzz/bin/python tests/fuzz/guided.py --seconds $(SECONDS) --seed $(SEED)

# TurboMind itself: needs a CUDA device, and an environment with `pip install -e '.[turbomind,dev]'`.
test-gpu:
	$(PYTHON) -m pytest tests/with_gpu

# How well output lengths are foretold on recorded traces: make bench-lengths LMDEPLOY_SLO_TRACES=DIR
bench-lengths: $(READY)
	$(BIN)/python tests/bench/bench_lengths.py --traces $(LMDEPLOY_SLO_TRACES) --hindsight

# Annealing beside every rule, in the simulator, and the time of a plan; goes on where it was interrupted. For instance
# make bench-planner BENCH="--quick --traces DIR"; tests/bench/bench_planner.py says what else there is.
bench-planner: $(READY)
	$(BIN)/python tests/bench/bench_planner.py $(BENCH)

# The paper's own setting, FCFS and annealing in every cell: make bench-paper BENCH="--seeds 3 --markdown FILE"
bench-paper: $(READY)
	$(BIN)/python tests/bench/bench_paper.py $(BENCH)

# Which engine serves a request, on several fleets: make bench-placement BENCH="--only table --traces DIR"
bench-placement: $(READY)
	$(BIN)/python tests/bench/bench_placement.py $(BENCH)

# The README's plot, from figures that bench-planner wrote.
plot-planner: $(READY)
	$(BIN)/python tests/bench/bench_planner_plot.py docs/results/planner.json docs/attainment.svg

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

# Exact versions and hashes of the development environment, for every Python that is supported.
lock: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --generate-hashes --no-annotate \
		--custom-compile-command "make lock" --output-file requirements-dev.lock pyproject.toml

# .venv with these and nothing else.
locked:
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	touch $(READY)

# docs/dependencies.md: what is needed at run time, and its licences.
dependencies: $(READY)
	$(BIN)/python tests/dependency_page.py

# Licences, and known vulnerabilities of the locked versions; the latter asks PyPI.
audit: $(READY)
	$(BIN)/python -m pytest -q tests/test_dependencies.py
	$(BIN)/python -m pip install --disable-pip-version-check --quiet pip-audit
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements-dev.lock

clean:
	rm -rf .venv .venv-lmdeploy .venv-interop .venv-fuzz .fuzz dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lmdeploy_slo tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Once, and again when the dependencies change.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	touch $(READY)

$(LMDEPLOY_READY): pyproject.toml $(LMDEPLOY_NEEDS)
	$(PYTHON) -m venv .venv-lmdeploy
	$(LMDEPLOY_BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_OPTIONS) -r $(LMDEPLOY_NEEDS) -e .
	$(LMDEPLOY_BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps lmdeploy==0.18.0
	touch $(LMDEPLOY_READY)

$(INTEROP_READY): $(INTEROP_NEEDS)
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --disable-pip-version-check --quiet -r $(INTEROP_NEEDS)
	touch $(INTEROP_READY)

$(FUZZ_READY): pyproject.toml tests/fuzz/requirements.txt
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --disable-pip-version-check --quiet -r tests/fuzz/requirements.txt -e .
	touch $(FUZZ_READY)
