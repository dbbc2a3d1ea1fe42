"""What can go wrong, checked from configs, headers and the disk before a model is loaded. `--dry-run` prints it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from core.errors import UserError
from core.fusion.projections import ATTENTION, PROJECTIONS, ROWS, recorded_sides
from core.fusion.settings import LEARNED, FusionSettings
from core.fusion.strengths import Strength, in_words
from core.models.checkpoints import Checkpoint
from core.runs.cost import BASE_BYTES, Cost
from core.runs.cost_table import cost_table
from core.runs.plan_directory import ROWS_CACHE, PlanDirectory
from core.runs.settings import Experiment
from core.training.soft_targets import BYTES_PER_POSITION

GIB = 2**30
# How many copies of a batch's logits are in memory for its losses, and with gradients of strengths (measured).
LOSS_LOGITS, LEARNING_LOGITS = 3, 4
FLOATS = {"F64", "F32", "F16", "BF16"}


def refuse(problems: list[str]) -> None:
    """Raise a UserError that lists all problems in one line, if there are any."""
    if problems:
        raise UserError("; ".join(problems))


def model_problems(role: str, model: Checkpoint, projections: Sequence[str]) -> list[str]:
    """Weights of projections that are missing, have another shape than the config says, or are quantised.

    The tensors of a quantised checkpoint hold codes, which must not be taken for weights.
    """
    layout, found = model.layout, []
    for layer in range(layout.n_layers):
        for name in projections:
            projection = PROJECTIONS[name]
            tensor = model.tensor_name(layer, name) + ".weight"
            expected = (layout.size(name), layout.size(projection.input_side))  # [out, in]
            if tensor not in model.headers:
                found.append(f"{tensor} is missing")
                continue
            shape, dtype = model.headers[tensor]
            if dtype not in FLOATS or "quantization_config" in model.config:
                return [f"{role} {model.folder} is quantised ({tensor} is {dtype}); give the unquantised checkpoint"]
            if shape != expected:
                found.append(f"{tensor} is {shape}, expected {expected}")
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [f"{role} {model.folder}: {found[0]}{more}; its config.json and weights do not belong together"]


def disk_problems(folder: Path, needed: float) -> list[str]:
    """Whether the disk lacks space for an output of `needed` bytes in `folder`, which may hold a part of it already."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    needed -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        f"{existing} has {free / GIB:.1f} GiB free and {folder} needs {needed / GIB:.1f}; free some space or write "
        f"elsewhere"
    ]


def memory_problems(needed: float, device: str) -> list[str]:
    """Whether the host lacks memory for an estimate of `needed` bytes. Accelerators report themselves when they do."""
    available = psutil.virtual_memory().available
    if device != "cpu" or available >= needed:
        return []
    return [
        f"about {needed / GIB:.1f} GiB of memory are needed and {available / GIB:.1f} are available; try --dtype "
        f"bfloat16, --device-map auto, or less data"
    ]


def describe(role: str, model: Checkpoint) -> str:
    """One line about a model: its shapes, which projections have biases, its size and its files."""
    layout = model.layout
    dtypes = sorted({dtype for _, dtype in model.headers.values()})
    n_files = len(set(model.files.values()))
    biased = [projection for projection in ATTENTION if _has_bias(model, projection)]
    return (
        f"{role} {model.name}: {layout.model_type}, {layout.n_layers} layers, hidden {layout.hidden}, "
        f"{layout.n_heads} heads of {layout.head_dim}, {layout.n_kv_heads} kv heads, biases "
        f"{' '.join(biased) or 'none'}, {sum(model.sizes.values()) / GIB:.2f} GiB of {'/'.join(dtypes)} in "
        f"{n_files} file{'s' if n_files > 1 else ''}"
    )


def _has_bias(model: Checkpoint, projection: str) -> bool:
    return model.tensor_name(0, projection) + ".bias" in model.headers


def stage2_memory(plans: PlanDirectory, target: Checkpoint, source: Checkpoint, experiment: Experiment) -> float:
    """Peak bytes of stage 2: the rows and feature maps of one pair of layers, one shard while it is written, or the
    target in float32 with all residuals and the logits of a batch while strengths are found."""
    settings, max_shard_bytes = experiment.fusion, experiment.output.max_shard_bytes
    n, m = (max(model.layout.size(side) for side in recorded_sides(settings.fused)) for model in (target, source))
    rows = plans.manifest.record["rows"]
    mixing = 4.0 * rows * (ROWS_CACHE * 2 + 2) * max(n, m) + 24.0 * n * m + 8.0 * m**2
    largest = max(target.sizes.values())
    shard = max(min(max_shard_bytes, sum(target.sizes.values())), largest) + 8 * largest
    finding = 0.0
    if settings.finds_alpha:
        # Of each fused weight W~, the target's own, and their difference while strengths are learned.
        residuals = residual_bytes(target, settings) * (1.5 if settings.alpha == LEARNED else 1.0)
        finding = 4.0 * sum(math.prod(shape) for shape, _ in target.headers.values()) + residuals
        # A longer text goes alone.
        tokens = max(experiment.compute.tokens_per_batch, plans.manifest.inputs["settings"]["max_tokens"])
        logits = LEARNING_LOGITS if settings.alpha == LEARNED else LOSS_LOGITS
        finding += 4.0 * logits * tokens * _vocabulary(target)
    return BASE_BYTES + max(mixing, shard, finding)


def _vocabulary(model: Checkpoint) -> int:
    """How many tokens a model chooses between: the rows of its input embeddings."""
    embeddings = f"{model.layout.family.tower}.embed_tokens.weight"
    return next(shape[0] for name, (shape, _) in model.headers.items() if model.name_in_model(name) == embeddings)


def task_vector_memory(source: Checkpoint, projections: Sequence[str]) -> float:
    """Bytes that the difference of the source to its base adds to `stage2_memory`: two weights and their difference."""
    widest = max(source.layout.size(name) * source.layout.size(PROJECTIONS[name].input_side) for name in projections)
    return 12.0 * widest


def stage2_disk(target: Checkpoint, settings: FusionSettings) -> float:
    """Bytes of the fused checkpoint: the target's weights, and the residuals.

    These are on disk twice while the files of the layers are joined, and once more for every further kind of rows.
    """
    return sum(target.sizes.values()) + (1 + len(settings.row_kinds)) * residual_bytes(target, settings)


def residual_bytes(target: Checkpoint, settings: FusionSettings) -> float:
    """Bytes of the residuals in float32: W~ and the target's W on the selection."""
    found = 0.0
    for name in settings.fused:
        projection = PROJECTIONS[name]
        size, other = target.layout.size(projection.selected_side), target.layout.size(projection.whole_side)
        selected = min(settings.top_k or size, size)
        found += 8.0 * selected * other * target.layout.n_layers
    return found


def stage1_report(target: Checkpoint, source: Checkpoint, cost: Cost) -> str:
    """What stage 1 would read, and what it would cost."""
    return "\n".join([describe("target", target), describe("source", source), cost_table(cost)])


def stage2_report(
    plans: PlanDirectory, target: Checkpoint, source: Checkpoint, settings: FusionSettings, memory: float, disk: float
) -> str:
    """What stage 2 would read and fuse, and what it would take.

    Args:
        memory, disk: bytes, of `stage2_memory` and `stage2_disk`.
    """
    lines = [
        describe("target", target),
        describe("source", source),
        f"plans {plans.folder}: {plans.shape[0]} x {plans.shape[1]} layers, {plans.manifest.record['rows']} rows",
        f"{settings.feature_map}, {settings.residual_form}, alpha {settings.alpha}",
    ]
    for name in settings.fused:
        projection = PROJECTIONS[name]
        kind, size = "rows" if projection.axis == ROWS else "columns", target.layout.size(projection.selected_side)
        both_biased = _has_bias(target, name) and _has_bias(source, name)
        lines.append(
            f"{name}: {min(settings.top_k or size, size)} of {size} {kind} in each of "
            f"{plans.shape[0]} layers, bias {'fused' if both_biased else 'not fused'}"
        )
    lines.append(f"peak memory about {memory / GIB:.1f} GiB, on disk {disk / GIB:.2f} GiB")
    return "\n".join(lines)


def stage3_report(
    start: Checkpoint, folder: Path, experiment: Experiment, strengths: Sequence[Strength], rows: tuple[int, int]
) -> str:
    """What stage 3 would do.

    Args:
        start: the model to train.
        strengths: the strengths to train with.
        rows: the numbers of rows to train on and to validate on.
    Raises:
        UserError: the tokenizer cannot be read, or the disk has too little space.
    """
    start.check_tokenizer()
    training, parameters = experiment.training, sum(math.prod(shape) for shape, _ in start.headers.values())
    # A resume point holds the weights and both moments of AdamW in float32, and a finished trial its weights.
    disk = sum(start.sizes.values()) + 16.0 * parameters
    if training.training_scenario == "distill" and experiment.distill.distill_by == "tokens":
        # As if no text were shorter than the limit, and the vocabularies differed.
        disk += float(BYTES_PER_POSITION) * rows[0] * training.block_size
    refuse(disk_problems(folder, disk))
    alphas = f", alpha {', '.join(map(in_words, strengths))}" if training.hot else ""
    rates = ", ".join(f"{rate:g}" for rate in training.lr_search or (training.learning_rate,))
    updates = math.ceil(rows[0] * training.epochs / (training.train_batch_size * training.gradient_accumulation))
    return "\n".join(
        [
            describe("start", start),
            f"{training.training_scenario}{alphas}, learning rate {rates}, seed {experiment.compute.seed}",
            f"{rows[0]} rows to train on, about {updates} updates; {rows[1]} rows to validate on",
            f"on disk at most {disk / GIB:.2f} GiB in {folder}; nothing is missing",
        ]
    )
