"""Where a checkpoint comes from: its models, data and settings, recorded in its manifest and printed in its card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import MANIFEST, read_json
from core.models.checkpoints import Checkpoint
from core.runs.licences import read_licence


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What cards and manifests say of one model: {name, hub_id, revision, weights, licence, loader}.

    `hub_id` and `revision` are None where they are not known. Of a local path only the last part is given as the name,
    because the folders above it are nobody else's business.
    """
    folder, path = checkpoint.folder, Path(checkpoint.name).expanduser()
    hub_id = checkpoint.name if checkpoint.name.count("/") == 1 and not path.exists() else None
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {
        "name": hub_id or Path(os.path.abspath(path)).name,
        "hub_id": hub_id,
        "revision": commit or checkpoint.revision or _recorded_origin(folder),
        "weights": checkpoint.identity["weights"],
        "licence": read_licence(folder, hub_id),
        "loader": checkpoint.layout.family.auto,
    }


def _recorded_origin(folder: Path) -> str | None:
    """The origin that scripts/fetch_demo_models.py recorded in a model's folder.

    A checkpoint of ours can hold such a file as well. It is a copy from its target and says nothing about it.
    """
    path = folder / "provenance.json"
    if not path.is_file() or (folder / MANIFEST).is_file():
        return None
    return read_json(path).get("origin")


def fused_lineage(
    target: Checkpoint,
    source: Checkpoint,
    made_from: Mapping[str, Any],
    fusion: dict[str, Any],
    source_base: Checkpoint | None = None,
) -> dict[str, Any]:
    """Where a fused checkpoint comes from: {models: role -> description, data, settings: stage -> settings}.

    Args:
        made_from: the inputs in the manifest of the plan directory.
        fusion: the settings of stage 2.
        source_base: the model that the source was tuned from, where their difference was transported.
    """
    models = {"target": describe_model(target), "source": describe_model(source)}
    if source_base is not None:
        models["source_base"] = describe_model(source_base)
    return {
        "models": models,
        "data": made_from["data"],
        "settings": {"plans": made_from["settings"], "fusion": fusion},
    }


def adapted_lineage(
    start: Checkpoint,
    before: Mapping[str, Any] | None,
    hot: bool,
    training: dict[str, Any],
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """Where an adapted checkpoint comes from, in the form of `fused_lineage`.

    Args:
        start: the checkpoint that training started from.
        before: its lineage, or None when no stage of ours made it.
        hot: the transported part took part in the training. Otherwise the models are the target alone, and the teacher.
        training: the settings of stage 3.
        teacher: the model that was distilled, if there was one.
    """
    if before is not None and hot:
        return {**before, "settings": {**before["settings"], "training": training}}
    models = {"target": describe_model(start) if before is None else before["models"]["target"]}
    if teacher is not None:
        models["teacher"] = describe_model(teacher)
    return {"models": models, "settings": {"training": training}}
