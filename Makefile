# `make demo` and `make test` need python3 (>= 3.10), make and pip; the rest is installed into VENV.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TESTS ?= not slow
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint soak bench clean

demo: $(INSTALLED)
	WANDB_MODE=$${WANDB_MODE:-offline} $(BIN)/saeray sweep sweeps/tiny.yaml

test: lint
	$(BIN)/python -m pytest -m '$(TESTS)'

# Whole hosts, soaks and peers: takes longer, and makes environments of its own for the peers.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check saeray tests benchmarks
	$(BIN)/ruff format --check saeray tests benchmarks
	$(BIN)/mypy

# Sweeps whose processes are killed at random: make soak SOAK='--seed 7 --minutes 60 --kills 4'
SOAK ?= --minutes 30
soak: $(INSTALLED)
	$(BIN)/python tests/faults/soak.py $(SOAK)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/peers.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info results
