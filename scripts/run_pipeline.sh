#!/usr/bin/env bash
# One experiment, all stages: bash scripts/run_pipeline.sh [--quick] [--config scripts/experiments/NAME.yaml]
# Without --config it is the demo pair, whose models are fetched first. Flags that all stages have work too, such as
# --device cuda. SEEDS="0 1 2" trains with each of these seeds, and the table averages them. What is finished is skipped.
# Times are for the demo pair on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

# The demo's two models, 3 GB below models/. 3 min, once
if [[ " $* " != *" --config"* ]]; then
  python scripts/fetch_demo_models.py
  set -- --config scripts/experiments/demo.yaml "$@"
fi
# Stage 1: both models read the texts, and optimal transport matches their layers and neurons -> plans/. 5 min
python run_activs_and_hot.py "$@"
# Stage 2: the source's attention weights, moved by the plans, are fused into the target -> fused/. 1 min
python core/generate_hot_residual.py "$@"
# Stage 3: fine-tuning from the plain target (no_hot), from it with the source as teacher (distill), and from the fused
# model (hot) -> adapted/. 2 min each
for seed in ${SEEDS:-0}; do
  for scenario in no_hot distill hot; do
    python core/train_hot_residual_sft.py "$@" --training-scenario "$scenario" --seed "$seed"
  done
done
# Stage 4: the loss of all models and controls on held-out texts -> results.json, and the table. 4 min
python evaluation/compare_arms.py "$@"
# The report: all figures of the run on one page -> report.html. 1 min
python evaluation/report.py "$@"
