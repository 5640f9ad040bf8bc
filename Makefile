# Two commands are enough: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test check bench clean

install: $(VENV)/installed

# torch first and under the same pins, or pip may fetch a second build of several GB for another package.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

demo: install
	rm -rf runs/digits
	$(BIN)/ecogen run digits --out runs/digits

# Three processes on two cores: most tests wait for processes of their own.
test: install check
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check ecogen tests benchmarks
	$(BIN)/ruff format --check ecogen tests benchmarks
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
