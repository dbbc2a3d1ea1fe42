#!/usr/bin/env bash
# The paper's Table 7: the size of the source. The models are our choice.
# Variables and flags are those of run_train_final.sh; the task is malay where TASKS names no other.
set -euo pipefail
export TASKS=${TASKS:-malay}
for source in unsloth/Llama-3.2-3B-Instruct unsloth/Llama-3.1-8B-Instruct unsloth/Llama-3.1-70B-Instruct; do
  bash "$(dirname "$0")/run_train_final.sh" --source-model "$source" "$@" || failed+=" $source"
done
[[ -z ${failed:-} ]] || { echo "failed:$failed (see above)" >&2 && exit 1; }
