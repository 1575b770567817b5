# make demo       the chat page on the built-in model, at http://127.0.0.1:7860
# make test       the whole test suite, the browser tests too
# make check      ruff, mypy and the tests: what CI runs
# make built-in   train the built-in model anew (an hour and a half on two cores)
# make evaluate   measure the built-in model on fresh scenes

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test check lint built-in evaluate clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/vlm serve

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

built-in: install
	@echo "This takes about an hour and a half on two cores. Cut short, it goes on where it was."
	OMP_NUM_THREADS=1 $(MAKE) -f built-in.mk -j2 parts
	$(MAKE) -f built-in.mk ship

evaluate: install
	$(BIN)/vlm data build scenes --num 1000 --seed 2027 --split test --out runs/evaluate
	$(BIN)/vlm eval runs/evaluate
	$(BIN)/vlm eval runs/evaluate --shuffled
	$(BIN)/vlm eval runs/evaluate --blind

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
