#!/usr/bin/env bash
# One experiment, all stages: bash scripts/run_pipeline.sh [--quick] [--config scripts/experiments/NAME.yaml]
# Finished stages are re-used. Without --config it runs the demo pair, and fetches it first.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

if [[ " $* " != *" --config"* ]]; then
  python scripts/fetch_demo_models.py
  set -- --config scripts/experiments/demo.yaml "$@"
fi
python run_activs_and_hot.py "$@"
python core/generate_hot_residual.py "$@"
python core/train_hot_residual_sft.py "$@" --training-scenario no_hot
python core/train_hot_residual_sft.py "$@" --training-scenario hot
python evaluation/compare_arms.py "$@"
