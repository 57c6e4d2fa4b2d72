# Every target makes and fills .venv itself; nothing is redone when pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint bench bench-fisher bench-eigen bench-processes bench-gpu configurations clean

demo: $(READY)
	$(BIN)/python examples/lightning_digits.py --logdir runs/demo/lightning_digits
	$(BIN)/python examples/transformers_char_lm.py --logdir runs/demo/transformers_char_lm
	@echo
	@echo "Both runs in one TensorBoard:"
	@echo "    $(BIN)/tensorboard --logdir runs/demo"

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(PEERS)
	$(BIN)/python -m pytest -m "slow or peer or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/probe.py --out benchmarks/results/probe.json

bench-fisher: $(PEERS)
	$(BIN)/python benchmarks/fisher.py --out benchmarks/results/fisher.json

bench-eigen: $(PEERS)
	$(BIN)/python benchmarks/eigen.py --out benchmarks/results/eigen.json

bench-processes: $(READY)
	$(BIN)/python benchmarks/processes.py --out benchmarks/results/processes.json

configurations: $(READY)
	$(BIN)/python -m tests.configurations.table docs/configurations.md

bench-gpu: $(PEERS)
	$(BIN)/python benchmarks/probe.py --device cuda --out benchmarks/results/probe_cuda.json
	$(BIN)/python benchmarks/fisher.py --device cuda --out benchmarks/results/fisher_cuda.json
	$(BIN)/python benchmarks/eigen.py --device cuda --out benchmarks/results/eigen_cuda.json

clean:
	rm -rf .venv runs

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	@touch $@

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --group bench
	@touch $@
