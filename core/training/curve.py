"""The loss curve of a training: taken from the Trainer's log, and written as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.files import atomic_file, write_json

CURVE, CURVE_IMAGE = "loss_curve.json", "loss_curve.png"


def curve_of(history: Sequence[dict[str, Any]], best_loss: float | None = None) -> dict[str, Any]:
    """The Trainer's log as a curve. All losses are in nats per token.

    Args:
        history: `TrainerState.log_history`.
        best_loss: the validation loss of the weights that are kept; None where the last weights are kept.
    Returns:
        {"unit", "train": [{update, loss, learning_rate, grad_norm}], "validation": [{update, loss}],
        "final_validation": the validation loss of the weights that are kept, None without validation}.
    """
    validation = [{"update": entry["step"], "loss": entry["eval_loss"]} for entry in history if "eval_loss" in entry]
    final = best_loss if best_loss is not None or not validation else validation[-1]["loss"]
    names = ("loss", "learning_rate", "grad_norm")
    train = [
        {"update": entry["step"], **{name: entry[name] for name in names if name in entry}}
        for entry in history
        if "loss" in entry
    ]
    return {"unit": "nats per token", "train": train, "validation": validation, "final_validation": final}


def save_curve(folder: Path, curve: dict[str, Any]) -> None:
    """Write a curve into the folder of a checkpoint, as JSON and as a picture."""
    from matplotlib.figure import Figure  # takes about a second to import, and is needed at the end alone

    write_json(folder / CURVE, curve)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train", "-"), ("validation", "o-")):
        if curve[name]:
            updates, losses = zip(*((point["update"], point["loss"]) for point in curve[name]), strict=True)
            axes.plot(updates, losses, style, label=name)
    axes.set(xlabel="update", ylabel=curve["unit"], title="loss")
    axes.legend()
    with atomic_file(folder / CURVE_IMAGE) as temporary:
        figure.savefig(temporary, format="png")
