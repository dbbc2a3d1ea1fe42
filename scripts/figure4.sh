#!/usr/bin/env bash
# The paper's Figure 4: the family of the source. The models are our choice.
# Variables and flags are those of run_train_final.sh; the task is malay where TASKS names no other.
set -euo pipefail
export TASKS=${TASKS:-malay}
for source in unsloth/Llama-3.1-8B-Instruct Qwen/Qwen2.5-7B-Instruct mistralai/Mistral-7B-Instruct-v0.3; do
  bash "$(dirname "$0")/run_train_final.sh" --source-model "$source" "$@" || failed+=" $source"
done
[[ -z ${failed:-} ]] || { echo "failed:$failed (see above)" >&2 && exit 1; }
