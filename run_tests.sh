#!/usr/bin/env bash
# Lint, types and tests. `./run_tests.sh` leaves the slow ones out; `./run_tests.sh --all` runs everything. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh
install_into_venv demo,baselines,examples,gcp,aws,dev

select=(-m "not slow")
# The floor of coverage is in pyproject.toml: only all tests together reach it.
if [ "${1:-}" = --all ]; then select=(--cov --cov-report=term:skip-covered); shift; fi
ruff check .
ruff format --check .
mypy
# Files go to worker processes whole: what a file's tests share, a Flink cluster say, is made once. Four at most: each holds encoders.
parallel=(--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
# An empty array is an unbound variable to the bash that macOS ships.
python -m pytest "${parallel[@]}" ${select[@]+"${select[@]}"} --durations=15 "$@"
