# Everything runs in .venv, made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS = $(shell find quantcache/csrc -type f)

.PHONY: help demo test check bench docs format build clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## answer a prompt with the default cache and with the int8 cache (DEMO_ARGS="--help")
	$(BIN)/quantcache demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests (TEST_ARGS="-k crop")
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(STAMP) ## lint, formatting, types, import rules, tables of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python -m tools.pages --check

format: $(STAMP) ## rewrite the code as check wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

BENCH_OUT = docs/benchmarks/peers-$(shell $(BIN)/python -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')").json

bench: $(STAMP) ## compare the caches that generate() takes (BENCH_ARGS="--size tiny -k attention")
	$(BIN)/python -m pytest tests/benchmarks/peers/bench_caches.py -q -c tests/benchmarks/pytest.ini --rootdir . \
		--benchmark-json=$(BENCH_OUT) --benchmark-columns=median,mean,iqr,rounds --benchmark-group-by=group $(BENCH_ARGS)

docs: $(STAMP) ## write the measured tables into the pages and build the site in site/, strictly
	$(BIN)/python -m tools.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

build: $(STAMP) ## make the wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what the targets made
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
