.PHONY: help install demo test test-all mutate lint format types docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## make .venv and install with the extras for development
	@bash -c 'source scripts/install.sh && install_into_venv demo,baselines,gcp,dev'

demo:  ## the whole way once on a simulated city, into ./work
	./run_local.sh

test:  ## lint, types and the quick tests
	./run_tests.sh

test-all:  ## lint, types and every test
	./run_tests.sh --all

mutate: install  ## plant plausible bugs one by one, and tell which no test notices
	.venv/bin/python -m scripts.mutate

lint: install  ## ruff
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

format: install  ## ruff, mending what it can
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

types: install  ## mypy on the three packages
	.venv/bin/mypy

docs: install  ## write the reference of tables and flags anew
	.venv/bin/python -m docs.generate

clean:  ## remove caches and the demo's output
	rm -rf work .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
