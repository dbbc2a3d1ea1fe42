#!/usr/bin/env bash
# The tests, the linter and the type checker: bash scripts/run_tests.sh [pytest arguments; default: all, two files at a time]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

ruff check .
ruff format --check .
mypy
shellcheck -x scripts/*.sh .ci/run
# Two files at a time, each on one thread, in the order of tests/conftest.py.
(($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder
OMP_NUM_THREADS=1 python -m pytest "$@"
