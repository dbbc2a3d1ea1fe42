#!/usr/bin/env bash
# One experiment, all stages: bash scripts/run_pipeline.sh [--quick] [--config scripts/experiments/NAME.yaml]
# Without --config it is the demo pair, whose models are fetched first. Flags that all stages have work too, such as
# --device cuda. Of relative paths only that of --config is meant from where this is started, others from the repository.
# SEEDS="0 1 2" trains with each of these seeds in place of the experiment's own, and the table averages them. What is
# finished is skipped. -q shows results and warnings alone, -v all that log.txt has. Times below are for the demo pair
# on two CPU cores, with the four attention projections and a strength that is given, as its file has them; all seven
# projections, and a search for the strength, take longer. The script begins with an estimate for this machine.
set -euo pipefail
flags=() verbosity=()
for flag in "$@"; do
  case $flag in
  -h | --help) sed -n '2,/^set /s/^# //p' "$0" && exit ;;
  -q | --quiet | -v | --verbose) verbosity=("$flag") ;;
  --config=*) flags+=(--config) && flag=${flag#*=} ;;
  esac
  # A relative path of --config is made absolute, because the folder changes below.
  [[ ${flags[*]: -1} != --config || $flag == /* ]] || flag=$PWD/$flag
  flags+=("$flag")
done
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

export RUN_BY_SCRIPT=yes # so that no stage names the command of the next one
# The demo's two models, 3 GB below models/. 3 min, once; a wrong flag is found before
if [[ " ${flags[*]} " != *" --config "* ]]; then
  flags=(--config scripts/experiments/demo.yaml "${flags[@]}")
  python core/runs/overview.py "${flags[@]}" --flags-only
  python scripts/fetch_demo_models.py "${verbosity[@]}"
fi
# What will be done, how long it takes on this machine, and where results go; seconds
python core/runs/overview.py "${flags[@]}"
# Stage 1: both models read the texts, and optimal transport matches their layers and neurons -> plans/. 5 min
python run_activs_and_hot.py "${flags[@]}"
# Stage 2: the source's weights, moved by the plans, are fused into the target -> fused/. 1 min
python core/generate_hot_residual.py "${flags[@]}"
# Stage 3: fine-tuning from the plain target (no_hot), from it with the source as teacher (distill), and from the fused
# model (hot) -> adapted/. 2 min each
read -ra seeds <<< "${SEEDS:-}"
for seed in "${seeds[@]:-}"; do
  for scenario in no_hot distill hot; do
    python core/train_hot_residual_sft.py "${flags[@]}" --training-scenario "$scenario" ${seed:+--seed "$seed"}
  done
done
# Stage 4: the loss of all models and controls on held-out texts -> results.json, and the table. 4 min
python evaluation/compare_arms.py "${flags[@]}"
# The report: all figures of the run on one page -> report.html. 1 min
python evaluation/report.py "${flags[@]}"
