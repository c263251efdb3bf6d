# Two commands on a machine that has Python >= 3.11, pip and make: `make install` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Threads beyond the cores make small tensors slower.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install install-dev test check unit clean

# The lock constrains what is installed; pyproject.toml says what is needed.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c requirements.lock "torch==$$(sed -n 's/^torch==//p' requirements.lock)"
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[bnb]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c requirements.lock --group dev
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# Everything: style, types, layers, tests.
test: check unit

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: install-dev
	$(BIN)/pytest -q

clean:
	rm -rf $(VENV) build dist src/*.egg-info
