#!/usr/bin/env bash
# The paper's six tasks: bash scripts/run_train_final.sh
#   TASKS="malay thai"            which (default all six; finance_paper is the paper's own finance pair)
#   STEPS="plans fuse train eval" which steps (general: also the paper's Figure 6); finished ones are skipped
#   DRY_RUN=1                     print every command with its settings, check models and data, run nothing
#   FEATURE_MAP=regression        our map on token rows, dense, alpha 0.1, in place of the paper's coupling and alphas
#   SEEDS="0 1 2", NUM_GPUS=2     trainings to average; read and train on so many GPUs (default: on the CPU)
#   VARIANT=source_size           Table 7; source_family: Figure 4; alpha: Figure 5 (scripts/experiments/variants.txt)
#   WORKSPACE_ROOT, MODELS_ROOT, TRANSPORT_RESULTS_ROOT   here; where models are, results go (default models/, runs/)
#   LM_EVAL_REPO, MALAY_REPO, YUE_BENCHMARK_ROOT          checkouts of the benchmarks (default $WORKSPACE_ROOT/NAME)
#   DATA_DIR, BENCHMARK_DATA      hold TASK.jsonl (or a folder TASK), and benchmark files (LM_EVAL_TASKS: your own tasks)
#   TARGET_MODEL, SOURCE_MODEL, ALPHA    one pair, one strength (of fusion and in training) for all tasks
#   MAX_SAMPLES, SFT_SAMPLES, HELD_OUT_SAMPLES, MAX_TOKENS, LIMIT   less text, fewer items; PROMPT=plain: without chat template
set -euo pipefail
# Paths are meant from where the script is started; a model that is no path is an id.
for name in {WORKSPACE,MODELS,TRANSPORT_RESULTS,YUE_BENCHMARK}_ROOT {LM_EVAL,MALAY}_REPO LM_EVAL_TASKS DATA_DIR BENCHMARK_DATA {TARGET,SOURCE}_MODEL; do
  [[ -z ${!name:-} || ${!name} == /* || ($name == *_MODEL && ! -e ${!name}) ]] || export "$name=$PWD/${!name}"
done
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

WORKSPACE_ROOT=${WORKSPACE_ROOT:-$PWD}
export MODELS_ROOT=${MODELS_ROOT:-$WORKSPACE_ROOT/models}
export MALAY_REPO=${MALAY_REPO:-$WORKSPACE_ROOT/MalayMMLU} YUE_BENCHMARK_ROOT=${YUE_BENCHMARK_ROOT:-$WORKSPACE_ROOT/Yue-Benchmark}
harness=${LM_EVAL_REPO:-$WORKSPACE_ROOT/lm-evaluation-harness}
[[ -z ${LM_EVAL_REPO:-} || -d $harness/lm_eval ]] || { echo "error: LM_EVAL_REPO=$harness is no clone of lm-evaluation-harness" >&2 && exit 2; }
[[ ! -d $harness ]] || export PYTHONPATH=$harness${PYTHONPATH:+:$PYTHONPATH}
export TRANSPORT_RESULTS_ROOT=${TRANSPORT_RESULTS_ROOT:-$WORKSPACE_ROOT/runs} && RESULTS=$TRANSPORT_RESULTS_ROOT
STEPS=${STEPS:-plans fuse train eval} FEATURE_MAP=${FEATURE_MAP:-coupling} failed=()

known() { [[ " $3 " == *" $2 "* ]] || { echo "error: $1 is $2; expected one of: $3" >&2 && exit 2; }; }

failing() { # $1: what failed just now, $2: its exit code; Ctrl-C stops everything
  (($2 != 130)) && failed+=("$1 (exit code $2, see the last error above)") || exit 130
}

run() { # a stage's command
  local command=(python "$@")
  if ((${NUM_GPUS:-0} > 0)) && [[ $1 != evaluation/collect_results.py ]]; then
    command+=(--device cuda)
    [[ $NUM_GPUS == 1 || $1 == core/generate_hot_residual.py || $1 == evaluation/* ]] ||
      command=(accelerate launch --num_processes "$NUM_GPUS" "${command[@]:1}")
  fi
  if [[ -z ${DRY_RUN:-} ]]; then
    "${command[@]}"
  else
    printf ' %s\n' "$(printf ' %q' "${command[@]}")"
    [[ $1 != run_activs_and_hot.py && $* != evaluation/run_task.py*"/base --model "* ]] || python "$@" --dry-run || wrong=$?
  fi
}

task() { # $1: name of an experiment; false at the first command that fails
  local name=$1 config=scripts/experiments/$1.yaml place=$RESULTS/$1${SUFFIX:-} alpha=${ALPHA:-} kind seed wrong=0
  local pair=(${TARGET_MODEL:+--target-model "$TARGET_MODEL"} ${SOURCE_MODEL:+--source-model "$SOURCE_MODEL"})
  local data=() cut=(${MAX_TOKENS:+--max-tokens "$MAX_TOKENS"}) maps=(--feature-map "$FEATURE_MAP") texts
  texts=("${cut[@]}" ${MAX_SAMPLES:+--calibration-samples "$MAX_SAMPLES"})
  [[ -f $config ]] || { echo "error: there is no $config" >&2 && return 2; }
  [[ -z ${DATA_DIR:-} ]] || data=(--data-file "$DATA_DIR/$name$([[ ! -e $DATA_DIR/$name.jsonl && -e $DATA_DIR/$name ]] || echo .jsonl)")
  local plans=$place # strengths, and maps on the same rows, share one folder, one after the other
  [[ ${SUFFIX:-} != -alpha* ]] || plans=$RESULTS/$name
  [[ $FEATURE_MAP == coupling ]] || place+=-$FEATURE_MAP
  if [[ $FEATURE_MAP == regression ]]; then
    plans+=-regression
    texts+=(--pooling token)
    maps+=(--top-k 0)
    alpha=${alpha:-0.1}
  fi
  [[ -z ${DRY_RUN:-} ]] || { echo "== $name: $config" && grep -v '^#' "$config" | grep . | sed 's/^/    /'; }
  if [[ " $STEPS " == *" plans "* ]]; then
    run run_activs_and_hot.py --config "$config" "${pair[@]}" "${data[@]}" "${texts[@]}" --out-dir "$plans/plans" || return
  fi
  if [[ " $STEPS " == *" fuse "* ]]; then
    run core/generate_hot_residual.py --config "$config" "${pair[@]}" "${maps[@]}" ${alpha:+--alpha "$alpha"} \
      --hot-dir "$plans/plans" --output-dir "$place/fused" || return
  fi
  for seed in ${SEEDS:-0}; do for kind in no_hot hot; do
    [[ " $STEPS " == *" train "* ]] || continue
    run core/train_hot_residual_sft.py --config "$config" "${data[@]}" ${SFT_SAMPLES:+--sft-samples "$SFT_SAMPLES"} \
      ${alpha:+--train-alpha "$alpha"} --training-scenario "$kind" --seed "$seed" --model-dir "$place/fused" \
      --output-dir "$place/adapted/$kind/seed$seed" || return
  done; done
  if [[ " $STEPS " == *" eval "* ]]; then
    run evaluation/compare_arms.py --config "$config" "${pair[@]}" "${data[@]}" "${cut[@]}" \
      ${HELD_OUT_SAMPLES:+--held-out-samples "$HELD_OUT_SAMPLES"} --hot-dir "$plans/plans" --run-dir "$place" || return
  fi
  for kind in eval general; do
    [[ " $STEPS " == *" $kind "* ]] || continue
    local list=${kind/eval/$name} scores=(run evaluation/run_task.py ${LIMIT:+--limit "$LIMIT"} ${PROMPT:+--prompt "$PROMPT"})
    scores+=(--task "$list" --output-dir)
    "${scores[@]}" "$RESULTS/$name/benchmarks/$list/base" \
      --model "${TARGET_MODEL:-$(sed -n 's/^target_model: *//p' "$config")}" || return
    "${scores[@]}" "$place/benchmarks/$list/fused" --model "$place/fused" || return
    for seed in ${SEEDS:-0}; do
      [[ " $STEPS " == *" train "* || -d $place/adapted/hot/seed$seed ]] || continue
      "${scores[@]}" "$place/benchmarks/$list/no_hot/seed$seed" --model "$place/adapted/no_hot/seed$seed" || return
      "${scores[@]}" "$place/benchmarks/$list/fused_adapted/seed$seed" --model "$place/adapted/hot/seed$seed" || return
    done
  done
  return "$wrong"
}

[[ ${NUM_GPUS:-0} =~ ^[0-9]+$ ]] || { echo "error: NUM_GPUS is $NUM_GPUS; expected a number" >&2 && exit 2; }
known FEATURE_MAP "$FEATURE_MAP" "coupling barycentric calibrated regression"
for step in $STEPS; do known STEPS "$step" "plans fuse train eval general"; done
if [[ -n ${VARIANT:-} ]]; then
  known VARIANT "$VARIANT" "source_size source_family alpha"
  while read -r variant suffix setting; do
    [[ $variant == "$VARIANT" ]] || continue
    env -u VARIANT TASKS="${TASKS:-malay}" SUFFIX="$suffix" "$setting" bash scripts/run_train_final.sh </dev/null || failing "$suffix" $?
  done < scripts/experiments/variants.txt
else
  TASKS=${TASKS:-medical thai finance cantonese indonesian malay}
  for name in $TASKS; do task "$name" || failing "$name" $?; done
  if [[ $STEPS == *eval* || $STEPS == *general* ]]; then # shellcheck disable=SC2086  # names of tasks, one word each
    run evaluation/collect_results.py --results-dir "$RESULTS" --tasks $TASKS || failing "the tables" $?
  fi
fi
((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[@]}" >&2 && exit 1; }
