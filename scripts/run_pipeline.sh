#!/usr/bin/env bash
# One experiment, all stages: bash scripts/run_pipeline.sh [--quick] [--config scripts/experiments/NAME.yaml]
# Without --config it runs the demo pair, whose models are fetched first. All flags that every stage has can be given,
# such as --device cuda. A relative path after --config is meant from the folder in which you start the script, and every
# other relative path from the repository.
# SEEDS="0 1 2" trains once with each of these seeds, in place of the seed of the experiment, and the table then shows
# their mean. Finished stages are skipped, so the same command continues a run that was stopped. With --dry-run all
# stages only check their inputs, and no model is fetched. -q shows only results and warnings, and -v shows everything
# that log.txt holds.
# The script begins by saying what it will do, where the results go, and how long that takes on your machine. The times
# below were measured with the demo pair on two shared CPU cores.
set -euo pipefail
flags=() verbosity=() dry_run=
for flag in "$@"; do
  case $flag in
  -h | --help) sed -n '2,/^set /s/^# //p' "$0" && exit ;;
  -q | --quiet | -v | --verbose) verbosity=("$flag") ;;
  --dry-run | --dry_run) dry_run=yes ;;
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
# Without an experiment file: the demo's two models, 3 GB below models/. What will be done is said before that, and a
# wrong flag is found. 3 min, once
if [[ " ${flags[*]} " != *" --config "* ]]; then
  flags=(--config scripts/experiments/demo.yaml "${flags[@]}")
  if [[ -z $dry_run ]]; then
    python core/runs/overview.py "${flags[@]}" --before-fetch
    python scripts/fetch_demo_models.py "${verbosity[@]}"
  fi
fi
# What will be done, where results go, and how long it takes on this machine. Seconds
python core/runs/overview.py "${flags[@]}"
# Stage 1: both models read the texts, and optimal transport matches their layers and neurons -> plans/. 8 min
python run_activs_and_hot.py "${flags[@]}"
# Stage 2: the source's weights, moved by the plans, are fused into the target -> fused/. 2 min
python core/generate_hot_residual.py "${flags[@]}"
# Stage 3: fine-tuning from the plain target (no_hot), from it with the source as teacher (distill), and from the fused
# model (hot) -> adapted/. 2 to 3 min each
read -ra seeds <<< "${SEEDS:-}"
for seed in "${seeds[@]:-}"; do
  for scenario in no_hot distill hot; do
    python core/train_hot_residual_sft.py "${flags[@]}" --training-scenario "$scenario" ${seed:+--seed "$seed"}
  done
done
# Stage 4: the loss of all models and controls on held-out texts -> results.json, and the table. 8 min
python evaluation/compare_arms.py "${flags[@]}"
# The report: all figures of the run on one page -> report.html. 1 min
python evaluation/report.py "${flags[@]}"
