# Every target sets up what it needs; `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

COMMANDS := train-teacher ensemble distill omit-classes evaluate run report

.PHONY: demo reproduce results test bench gpu torture lint clean $(COMMANDS)
demo: .venv/ready
	$(BIN)/kd run digits

# The paper's table over five seeds; it continues where an earlier call stopped.
reproduce: .venv/ready
	$(BIN)/kd run mnist --seeds 0-4

# Keeps finished reports as the record: make results REPORTS="runs/mnist/report runs/digits/report"
results: .venv/ready
	$(BIN)/python tools/results.py $(REPORTS)

# make distill EXPERIMENT=digits ARGS="--T 3 --lambda1 0.9"
$(COMMANDS): .venv/ready
	$(BIN)/kd $@ $(EXPERIMENT) $(ARGS)

test: .venv/ready
	$(BIN)/pytest -q -n auto --dist loadscope --no-loadscope-reorder

bench: .venv/ready
	$(BIN)/python tools/bench.py

# On a machine with a GPU: every figure of it in one call.
gpu: .venv/ready
	$(BIN)/python tools/gpu.py

torture: .venv/ready
	$(BIN)/python tools/torture.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

# With uv where it is installed. An index of CPU-only wheels of torch spares most of it: PIP_EXTRA_INDEX_URL=URL make demo
.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv: torch, torchvision and what else kd takes; with a CUDA build of torch, the usual one on Linux,"
	@echo "3 GB to download and 6 GB of disk: three to ten minutes, once (uv, where it is installed: one)"
ifeq ($(shell command -v uv),)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
else
	uv venv --python $(PYTHON) --allow-existing .venv
	uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
endif
	touch $@
