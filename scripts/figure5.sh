#!/usr/bin/env bash
# The paper's Figure 5: the strength of fusion, in training too. All strengths use the same plans.
# Variables and flags are those of run_train_final.sh; the task is malay where TASKS names no other.
set -euo pipefail
export TASKS=${TASKS:-malay}
for alpha in 0.005 0.01 0.03 0.05 0.1 0.15 0.2; do
  bash "$(dirname "$0")/run_train_final.sh" --alpha "$alpha" "$@" || failed+=" $alpha"
done
[[ -z ${failed:-} ]] || { echo "failed:$failed (see above)" >&2 && exit 1; }
