"""Whether scores and losses are of the models that are in a run's folders now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, digest_of, read_json
from core.manifest import FORMAT_VERSION, check_format
from evaluation.arms.run import RESULTS, TRAINED, training_folders
from evaluation.tables.arm_scores import ArmScore, ArmScores, present


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of what is in a folder of ours now, finished or not; empty where there is none.

    Raises:
        UserError: the manifest has another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    record = read_json(path)
    check_format(folder, record)
    return record


def check_losses(run: Path, record: Mapping[str, Any]) -> None:
    """Refuse losses on held-out texts that are not of the run's present models.

    Args:
        record: contents of the run's `results.json`.
    Raises:
        UserError: the losses are of an earlier version, unfinished, or of earlier models.
    """
    path, command = run / RESULTS, "run evaluation/compare_arms.py again"
    if record.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} is of an earlier version; {command}")
    if "arms" not in record:
        raise UserError(f"{path} is not finished; {command} to finish it")
    trained = {
        f"{arm}/{folder.name}": digest_of(manifest_of(folder))
        for arm in TRAINED
        for folder in training_folders(run, arm)
        if (folder / MANIFEST).is_file()
    }
    measured = {arm: made for arm, made in record.get("made_from", {}).items() if "/" in arm}
    fused = manifest_of(run / "fused").get("fingerprint")
    if (record.get("inputs", {}).get("fused"), measured) != (fused, trained):
        raise UserError(f"{path} is of earlier models; {command}")


def check_scores(run: Path, arms: Mapping[str, ArmScores]) -> None:
    """Refuse scores that are not of the run's present models.

    Raises:
        UserError: the base that was scored is not the run's target, or a fused or adapted model was made again since.
    """
    fused = manifest_of(run / "fused")
    for arm, scores in arms.items():
        for name, score in present(scores).items():
            if arm == "base":
                _check_base(run, name, score, fused.get("inputs", {}).get("target", {}))
            else:
                _check_made(run, arm, name, score, fused.get("fingerprint"))


def _check_base(run: Path, name: str, score: ArmScore, target: Mapping[str, Any]) -> None:
    model = score.model
    if any(key in model and key in target and model[key] != target[key] for key in ("config", "weights", "made")):
        raise UserError(
            f"{name}: the base that was scored is not the target of {run}; run evaluation/run_task.py again for the "
            "base"
        )


def _check_made(run: Path, arm: str, name: str, score: ArmScore, fused: str | None) -> None:
    for seed, made in score.made.items():
        folder = run / "fused" if arm == "fused" else run / TRAINED[arm] / seed
        found = manifest_of(folder)
        if made != found.get("fingerprint"):
            raise UserError(
                f"{name}: {folder} is not the model that was scored, it was made anew since or is gone; run "
                "evaluation/run_task.py again for it, or remove its scores"
            )
        start = found.get("inputs", {}).get("made_by")
        if arm != "fused" and start != fused:
            raise UserError(
                f"{name}: {folder} was trained from another fused model ({start}); run stage 3 and "
                "evaluation/run_task.py again for it, or remove its scores"
            )
