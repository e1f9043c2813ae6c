.PHONY: help install demo test test-all mutate lint format types docs picture clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## make .venv and install with the extras for development
	@bash -c 'source scripts/install.sh && install_into_venv demo,baselines,examples,gcp,aws,dev'

demo:  ## the whole way once on a simulated city, into ./work
	./run_local.sh

test:  ## lint, types and the quick tests
	./run_tests.sh

test-all:  ## lint, types and every test
	./run_tests.sh --all

mutate: install  ## introduce plausible bugs one by one, and list those that no test notices
	.venv/bin/python -m scripts.mutate

lint: install  ## ruff
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

format: install  ## ruff, fixing what it can
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

types: install  ## mypy, strict, on every package
	.venv/bin/mypy

docs: install  ## write the generated pages of docs/ again
	.venv/bin/python -m docs.generate

picture: install  ## write docs/report.png from the demo's report (RUN=work)
	.venv/bin/python -m scripts.picture --run $(or $(RUN),work)

clean:  ## remove caches and the demo's output
	rm -rf work .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
