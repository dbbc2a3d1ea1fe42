"""Which values the settings of an experiment may have, and which of them exclude each other."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from core.hub import check_repo_id
from core.runs.process import UserError

if TYPE_CHECKING:
    from core.runs.settings import Experiment

# Plans need so many texts or rows.
MIN_TEXTS = 16
POSITIVE = "epsilon eta sinkhorn_tol ridge epochs learning_rate lora_alpha distill_temperature".split()
AT_LEAST_ONE = (
    "max_tokens max_samples tokens_per_batch sinkhorn_iters pairs_budget_mb p_topk q_topk sft_samples block_size "
    "train_batch_size gradient_accumulation save_steps eval_steps early_stop lora_rank held_out_samples"
).split()


def check_settings(e: Experiment) -> None:
    """Raise UserError for a value out of range."""
    for name in ("alpha", "train_alpha", "distill_weight", "lora_dropout"):
        value = getattr(e, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; expected a number from 0 to 1")
    for name in POSITIVE:
        value = getattr(e, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; expected a positive number")
    if e.max_rows < MIN_TEXTS:
        raise UserError(f"max_rows is {e.max_rows}; plans need at least {MIN_TEXTS} rows")
    if e.seed < 0 or e.split_seed < 0:
        raise UserError(f"seed is {min(e.seed, e.split_seed)}; expected 0 or more")
    if e.q_topk is not None and e.feature_map == "regression":
        raise UserError("q_topk thins out plans, which regression does not read; leave it out")
    for name in AT_LEAST_ONE:
        value = getattr(e, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    _check_training(e)
    check_repo_id(e.push_to_hub)
    if e.max_shard_bytes < 1:
        raise UserError(f"max_shard_size is {e.max_shard_size!r}; expected a size like 5GB or 500MB")
    if e.activations_budget_mb < 0:
        raise UserError(f"activations_budget_mb is {e.activations_budget_mb}; expected 0 (all on disk) or more")
    if e.top_k < 0:
        raise UserError(f"top_k is {e.top_k}; expected 0 (all neurons) or more")
    if e.calibration_samples < MIN_TEXTS:
        raise UserError(f"calibration_samples is {e.calibration_samples}; plans need at least {MIN_TEXTS} texts")
    check_device(e.device)
    for f in dataclasses.fields(e):
        choices, value = f.metadata["choices"], getattr(e, f.name)
        if choices and value not in (None, "") and value not in choices:
            raise UserError(f"{f.name} is {value!r}; expected one of {', '.join(choices)}")


def _check_training(e: Experiment) -> None:
    for name in ("warmup", "weight_decay", "max_grad_norm", "validation_samples"):
        value = getattr(e, name)
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; expected 0 or more")
    if e.warmup >= 1 and e.warmup != int(e.warmup):
        raise UserError(f"warmup is {e.warmup}; expected a share below 1, or a whole number of updates")
    if any(not 0 <= alpha <= 1 for alpha in e.alpha_search):
        raise UserError(f"alpha_search is {e.alpha_search}; expected numbers from 0 to 1")
    if any(not (rate > 0 and math.isfinite(rate)) for rate in e.lr_search):
        raise UserError(f"lr_search is {e.lr_search}; expected positive numbers")
    if (e.alpha_search or e.lr_search or e.early_stop) and not e.validation_samples:
        raise UserError("a search and early_stop choose on validation rows; give --validation-samples")
    if e.alpha_search and e.train_alpha is not None:
        raise UserError("train_alpha and alpha_search exclude each other; give one of them")
    if e.early_stop and e.eval_steps not in (None, e.save_steps):
        raise UserError("early_stop validates at each of save_steps; leave eval_steps out")
    if e.warmup and e.lr_scheduler == "constant":
        raise UserError("lr_scheduler constant has no warmup; take constant_with_warmup")
    if e.eval_steps and not e.validation_samples:
        raise UserError("eval_steps needs rows to validate on; give --validation-samples")
    if e.save_untrained_folded and len(e.alpha_search) > 1 and e.training_scenario == "hot":
        raise UserError("save_untrained_folded writes one alpha; leave alpha_search out")
    if e.freeze_strategy == "frozen_base" and e.use_lora:
        raise UserError("LoRA adapts the base, which frozen_base freezes; leave out one of the two")


def check_device(name: str) -> None:
    """Raise UserError for a device that this machine does not have."""
    try:
        device = torch.device(name)
        present = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
        usable = (device.index or 0) < present
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"device {name!r} is not available here; use cpu, or cuda on a machine with a GPU")
