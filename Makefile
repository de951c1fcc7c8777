# Everything runs in .venv, made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
KERNELS = $(shell find quantcache/csrc -type f)

.PHONY: help install install-oldest demo test test-oldest test-newest test-serving check bench docs site format build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv; every other target but demo does so too

# No more than the demo needs, and nothing where the rest is there already. Without bytecode it takes half the time.
$(DEMO_STAMP): pyproject.toml constraints.txt
	@echo "Installing torch, transformers and quantcache in $(VENV): a GB, a minute."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --editable '.[demo]'
	@touch $@

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_STAMP)) ## ask about a long document with the default and the int8 cache (DEMO_ARGS="--help")
	$(BIN)/quantcache demo $(DEMO_ARGS)

# A process of one thread for each processor. Each begins with tests that follow one another, so that few fixtures of a
# module are made twice; one that is done takes over some of another's. pytest-benchmark warns of company.
RUN_TESTS := -m pytest -n logical --maxprocesses 8 --dist worksteal -p no:benchmark
test test-oldest test-newest test-serving: export OMP_NUM_THREADS := 1

test: $(STAMP) ## run the tests (TEST_ARGS="-k crop", TEST_ARGS="-n 0" for one process)
	$(BIN)/python $(RUN_TESTS) $(TEST_ARGS)

SERVING_TESTS := tests/test_serving.py tests/test_serving_host.py tests/test_serving_refusals.py tests/test_stopping.py

# What shows a host that is not as assumed: its contract, generate, the matrix and all causal models in their short forms,
# Qwen v1, prompt caches, routing, serving where it knows the host; four minutes at most.
HOST_TESTS := tests/test_host.py tests/test_host_private.py tests/test_layer_contract.py tests/test_generate.py tests/test_matrix.py \
	tests/test_causal_models.py \
	tests/test_qwen_model.py tests/test_qwen_chat.py tests/test_files.py tests/test_attention.py $(SERVING_TESTS)
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
NEWEST := .venv-newest

# Where a name is in both files of versions, the older one counts.
$(OLDEST_STAMP): pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE "^($$(sed -n 's/==.*//p' constraints-oldest.txt | paste -sd '|'))==" constraints.txt \
		| cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt --editable '.[test]'
	@touch $@

# Continuous batching changes from release to release: the others that serving knows, laid over .venv. 5.22 is as 5.21.
SERVING_RELEASES := 5.21.0 5.23.0

test-serving: $(STAMP) ## run the tests of serving on the other releases of transformers that it knows
	set -e; for release in $(SERVING_RELEASES); do \
		test -d .transformers/$$release || \
			$(BIN)/python -m pip install --quiet --no-deps --target .transformers/$$release transformers==$$release; \
		PYTHONPATH=.transformers/$$release $(BIN)/python $(RUN_TESTS) $(SERVING_TESTS) $(TEST_ARGS); \
	done

install-oldest: $(OLDEST_STAMP) # for .ci/run, which does it beside other things

test-oldest: $(OLDEST_STAMP) ## run what a host can break on the oldest torch and transformers that are supported
	$(OLDEST)/bin/python $(RUN_TESTS) -m "not slow and not cuda and not real_model" $(HOST_TESTS) $(TEST_ARGS)

test-newest: ## the same on the newest versions of everything that pip finds now, whatever constraints.txt says
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	@$(NEWEST)/bin/python -m pip list | grep -E "^(torch|transformers) "
	$(NEWEST)/bin/python $(RUN_TESTS) -m "not slow and not cuda and not real_model" $(HOST_TESTS) $(TEST_ARGS)

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
	$(MAKE) --no-print-directory site

site: $(STAMP) ## build the site in site/, strictly, with the tables there are; `check` says whether they are right
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The kernels are built by the hook tools/wheel.py, those of each GPU in some ten minutes of a processor, and kept.
# QUANTCACHE_KERNELS="* sm_90*" makes a wheel with some of them.
build: $(STAMP) ## make the wheels in dist/: the pure one, and for Linux on x86-64 the one with kernels in it
	$(BIN)/python -m hatchling build --target wheel --directory dist
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then set -x; \
		HATCH_BUILD_HOOK_ENABLE_CUSTOM=true $(BIN)/python -m hatchling build --target wheel --directory dist; fi

clean: ## remove what the targets made
	rm -rf $(VENV) $(OLDEST) $(NEWEST) .transformers dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
