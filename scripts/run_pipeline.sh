#!/usr/bin/env bash
# One experiment, all stages: bash scripts/run_pipeline.sh [--quick] [--config scripts/experiments/NAME.yaml]
# Finished stages are re-used. Without --config it runs the demo pair, and fetches it first. SEEDS="0 1 2" trains with
# each of these seeds, and the table averages them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

if [[ " $* " != *" --config"* ]]; then
  python scripts/fetch_demo_models.py
  set -- --config scripts/experiments/demo.yaml "$@"
fi
python run_activs_and_hot.py "$@"
python core/generate_hot_residual.py "$@"
for seed in ${SEEDS:-0}; do
  for scenario in no_hot distill hot; do
    python core/train_hot_residual_sft.py "$@" --training-scenario "$scenario" --seed "$seed"
  done
done
python evaluation/compare_arms.py "$@"
