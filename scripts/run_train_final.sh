#!/usr/bin/env bash
# The paper's six tasks: bash scripts/run_train_final.sh
#   TASKS="malay thai"            which (default all six; finance_paper is the paper's own finance pair)
#   STEPS="plans fuse train eval" which steps; finished ones are skipped by their manifests
#   DRY_RUN=1                     print every command with its settings, check models and data, run nothing
#   FEATURE_MAP=regression        our map on token rows, dense, alpha 0.1, in place of the paper's coupling and alphas
#   SEEDS="0 1 2"                 trainings to average
#   MODELS_ROOT, TRANSPORT_RESULTS_ROOT, WORKSPACE_ROOT   where models are and results go (default models/, runs/, here)
#   DATA_DIR                      holds TASK.jsonl (or a folder TASK) in place of the hub's data
#   TARGET_MODEL, SOURCE_MODEL    one pair for all tasks
#   MAX_SAMPLES, SFT_SAMPLES, HELD_OUT_SAMPLES, MAX_TOKENS   fewer and shorter texts
#   ALPHA=0.05                    strength of fusion and in training, for all tasks
#   NUM_GPUS=2                    read and train on so many GPUs (default: on the CPU)
# What is evaluated is the loss on held-out rows of the same data; the paper's benchmarks are not wired up yet.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

WORKSPACE_ROOT=${WORKSPACE_ROOT:-$PWD}
export MODELS_ROOT=${MODELS_ROOT:-$WORKSPACE_ROOT/models}
RESULTS=${TRANSPORT_RESULTS_ROOT:-$WORKSPACE_ROOT/runs}
TASKS=${TASKS:-medical thai finance cantonese indonesian malay}
STEPS=${STEPS:-plans fuse train eval}
FEATURE_MAP=${FEATURE_MAP:-coupling}
failed=()

run() { # a stage's command
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '  %q' python "$@"
    echo
  elif ((${NUM_GPUS:-1} > 1)) && [[ $1 != core/generate_hot_residual.py && $1 != evaluation/* ]]; then
    accelerate launch --num_processes "$NUM_GPUS" "$@" --device cuda
  elif ((${NUM_GPUS:-0} > 0)); then
    python "$@" --device cuda
  else
    python "$@"
  fi
}

task() { # $1: name of an experiment; false at the first command that fails
  local name=$1 config=scripts/experiments/$1.yaml place=$RESULTS/$1
  local pair=() data=() texts=() rows=() held_out=() strength=() maps=(--feature-map "$FEATURE_MAP") alpha=${ALPHA:-}
  if [[ ! -f $config ]]; then
    echo "error: there is no $config" >&2
    return 2
  fi
  [[ -z ${TARGET_MODEL:-} ]] || pair+=(--target-model "$TARGET_MODEL")
  [[ -z ${SOURCE_MODEL:-} ]] || pair+=(--source-model "$SOURCE_MODEL")
  if [[ -n ${DATA_DIR:-} ]]; then
    if [[ -e $DATA_DIR/$name.jsonl ]]; then data=(--data-file "$DATA_DIR/$name.jsonl"); else data=(--data-file "$DATA_DIR/$name"); fi
  fi
  [[ -z ${MAX_SAMPLES:-} ]] || texts=(--calibration-samples "$MAX_SAMPLES")
  [[ -z ${SFT_SAMPLES:-} ]] || rows=(--sft-samples "$SFT_SAMPLES")
  [[ -z ${HELD_OUT_SAMPLES:-} ]] || held_out=(--held-out-samples "$HELD_OUT_SAMPLES")
  if [[ -n ${MAX_TOKENS:-} ]]; then
    texts+=(--max-tokens "$MAX_TOKENS")
    held_out+=(--max-tokens "$MAX_TOKENS")
  fi
  if [[ $FEATURE_MAP == regression ]]; then
    place+=-regression
    texts+=(--pooling token)
    maps+=(--top-k 0)
    alpha=${alpha:-0.1}
  fi
  if [[ -n $alpha ]]; then
    maps+=(--alpha "$alpha")
    strength=(--train-alpha "$alpha")
  fi
  if [[ -n ${DRY_RUN:-} ]]; then
    echo "== $name: $config"
    grep -v '^#' "$config" | grep . | sed 's/^/    /'
  fi
  local stage1=(run_activs_and_hot.py --config "$config" "${pair[@]}" "${data[@]}" "${texts[@]}" --out-dir "$place/plans")
  if [[ " $STEPS " == *" plans "* ]]; then
    run "${stage1[@]}" || return
    [[ -z ${DRY_RUN:-} ]] || python "${stage1[@]}" --dry-run || return
  fi
  if [[ " $STEPS " == *" fuse "* ]]; then
    run core/generate_hot_residual.py --config "$config" "${pair[@]}" "${maps[@]}" --hot-dir "$place/plans" \
      --output-dir "$place/fused" || return
  fi
  if [[ " $STEPS " == *" train "* ]]; then
    local seed scenario
    for seed in ${SEEDS:-0}; do
      for scenario in no_hot hot; do
        run core/train_hot_residual_sft.py --config "$config" "${data[@]}" "${rows[@]}" "${strength[@]}" \
          --training-scenario "$scenario" --seed "$seed" --model-dir "$place/fused" --output-dir "$place/adapted/$scenario/seed$seed" || return
      done
    done
  fi
  if [[ " $STEPS " == *" eval "* ]]; then
    run evaluation/compare_arms.py --config "$config" "${pair[@]}" "${data[@]}" "${held_out[@]}" --run-dir "$place" || return
  fi
}

for name in $TASKS; do
  task "$name" || failed+=("$name (exit code $?, see the last error above)")
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
