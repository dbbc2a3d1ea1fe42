#!/usr/bin/env bash
# The paper's six tasks, from two models and texts to a table beside the paper's figures:
#   bash scripts/run_train_final.sh                                      everything, with the paper's settings
#   TASKS="malay thai" DRY_RUN=1 bash scripts/run_train_final.sh         check models and texts, say what would be done
#   bash scripts/run_train_final.sh --target-model X --max-samples 160   any setting of any stage
# A task is a file scripts/experiments/TASK.yaml; --help lists what can be set. The same command goes on after a kill.
# Times below: models of 1B and 8B on one GPU (estimated) / the demo pair with 160 texts on two CPU cores.
set -euo pipefail
# Table 7, Figure 4 and Figure 5 are scripts beside this one; VARIANT calls them as well.
case ${VARIANT:-} in source_size) variant=table7 ;; source_family) variant=figure4 ;; alpha) variant=figure5 ;; esac
[[ -z ${variant:-} ]] || exec env -u VARIANT bash "$(dirname "$0")/$variant.sh" "$@"
started_in=$PWD
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

# What is set, in one YAML per task (CONFIGS) and in TASKS, STEPS, SEEDS, LAUNCH, DRY_RUN. Wrong values end it here.
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
export RUN_BY_SCRIPT=yes # so that no stage names the command of the next one
trap 'trap - INT && kill -INT $$' INT # Ctrl-C ends everything, whatever exit code the stage makes of it
python core/runs/resolve.py --started-in "$started_in" --work-dir "$work" "$@"
[[ -f $work/settings.sh ]] || exit 0 # --help was all that was asked for
# shellcheck source=/dev/null
. "$work/settings.sh"

((${#DRY_RUN[@]} == 0)) || echo "A dry run: the experiment.yaml of the commands below is not written."
failed=()
step() { # NAME COMMAND...: run a command when STEPS has NAME. The first one that fails is noted, and ends its task.
  local name=$1 status error
  [[ -z $stopped && " ${STEPS[*]} " == *" $name "* ]] || return 0
  shift
  set -- "$@" "${VERBOSITY[@]}"
  printf '\n$%s\n' "$(printf ' %q' "${@/#"$work"/"$TRANSPORT_RESULTS_ROOT"}")" # the copy that stays
  if ((${#DRY_RUN[@]})); then # the stage itself says what is missing; it needs no launcher for that
    while [[ $1 != *.py ]]; do shift; done
    set -- python "$@" "${DRY_RUN[@]}"
  fi
  { "$@" 2>&1 >&3 | tee -i "$work/errors" >&2; } 3>&1 && return # errors to the screen and to a file
  status=$?
  error=$(grep -ao 'error: .*' "$work/errors" | tail -n 1) || error=$(tr -s '\r\n' '\n' < "$work/errors" | tail -n 1)
  failed+=("$run, $name: $error (exit code $status)")
  ((${#DRY_RUN[@]})) || stopped=yes
}

for config in "${CONFIGS[@]}"; do
  run=$(basename "$(dirname "$config")") stopped=
  printf '\n== %s\n%s\n' "$run" "$(< "$config")"
  # Stage 1: both models read the texts, and optimal transport matches their layers and neurons. 10 min / 5 min
  step plans "${LAUNCH[@]}" run_activs_and_hot.py --config "$config"
  # Stage 2: the source's weights, moved by the plans, are fused into the target. 1 min / 1 min
  step fuse python core/generate_hot_residual.py --config "$config"
  # Stage 3: fine-tuning from the plain target (no_hot) and from the fused model (hot). 10 min / 2 min each
  for seed in "${SEEDS[@]:-}"; do # without SEEDS it is the one of the config
    for scenario in no_hot hot; do
      step train "${LAUNCH[@]}" core/train_hot_residual_sft.py --config "$config" --training-scenario "$scenario" \
        ${seed:+--seed "$seed"}
    done
  done
  # Stage 4: the loss of all models and controls on held-out texts. 5 min / 4 min
  step eval python evaluation/compare_arms.py --config "$config"
  # The scores of all models on the task's benchmarks, and on general ones. Minutes to hours / 5 min with LIMIT=5
  step eval python evaluation/run_task.py --config "$config"
  step general python evaluation/run_task.py --config "$config" --task general
done

# One table per task, of all its runs that are there, in TRANSPORT_RESULTS_ROOT/tables. Seconds.
run="the tables" stopped=
step tables python evaluation/collect_results.py --tasks "${TASKS[@]}"
# The report of every run that is new or has changed, and TRANSPORT_RESULTS_ROOT/report.html, which lists all. 1 min each
run="the report" stopped=
step tables python evaluation/report.py "$TRANSPORT_RESULTS_ROOT"
((${#failed[@]} == 0)) || { printf '\nfailed: %s' "${failed[@]}" >&2 && echo >&2 && exit 1; }
