# make demo   quantize the bundled model and print its accuracy report
# make test   run the tests;  make lint, make types: the other checks;  make clean: remove what these made
# Each installs what it needs into .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALLED := $(VENV)/installed.stamp

.PHONY: demo test lint types clean

demo: $(INSTALLED)
	$(BIN)/llmpare quantize examples/tiny-llama -o out/tiny-llama-w4
	@echo
	@cat out/tiny-llama-w4/report.md

# One thread for each of two workers: most tests are small, and start faster than threads do.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch comes first and by itself: the other packages then settle for the build that is there.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[data,dev,distill,eval]'
	@touch $@
