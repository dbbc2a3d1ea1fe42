#!/usr/bin/env bash
# The tests, the linter and the type checker: bash scripts/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
