"""The runs beside a run that differ from it in one thing alone: the strength of fusion, or the source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from evaluation.figures.sensitivity import Point
from evaluation.pages.benchmark_scores import benchmark_sets, task_of
from evaluation.pages.run_files import RunFiles, is_run

COMPARED = ("fused", "fused_adapted")


def siblings(files: RunFiles) -> tuple[list[Point], list[Point]]:
    """(runs that differ in alpha alone, runs that differ in the source alone), each with the run itself; a list is
    empty where no other run is in it."""
    if files.fused is None or files.results is None:
        return [], []
    strengths, sources = [], []
    for folder in sorted(files.folder.resolve().parent.glob("*/")):
        other = files if folder == files.folder.resolve() else _read(folder)
        if other is None or other.fused is None or other.results is None:
            continue
        point, ours, theirs = point_of(other), _made_from(files), _made_from(other)
        if point is None or any(ours[key] != theirs[key] for key in ("task", "data", "target")):
            continue
        if ours["settings"] == theirs["settings"] and ours["source"] == theirs["source"]:
            strengths.append(point)
        if (ours["settings"], ours["alpha"]) == (theirs["settings"], theirs["alpha"]):
            sources.append(point)
    several_strengths = len({point.alpha for point in strengths}) > 1
    several_sources = len({point.source for point in sources}) > 1
    return strengths if several_strengths else [], sources if several_sources else []


def _read(folder: Path) -> RunFiles | None:
    """Another run, or None where it cannot be read: it is no part of this report, and what is wrong with it is said in
    its own."""
    try:
        return RunFiles.read(folder) if is_run(folder) else None
    except UserError:
        return None


def _made_from(files: RunFiles) -> dict[str, Any]:
    assert files.fused is not None and files.results is not None
    inputs = files.fused.inputs
    settings = dict(inputs["settings"])
    alpha = settings.pop("alpha")
    return {
        "task": task_of(files.folder),
        "data": files.results["inputs"]["data"]["sha256"],
        "target": inputs["target"]["weights"],
        "source": inputs["source"]["weights"],
        "alpha": alpha,
        "settings": settings,
    }


def point_of(files: RunFiles) -> Point | None:
    """What a run adds to a comparison; None for learned strengths, which have no place on an axis."""
    assert files.fused is not None and files.results is not None
    alpha = files.fused.inputs["settings"]["alpha"]
    if not isinstance(alpha, int | float):
        return None
    arms: Mapping[str, Mapping[str, Any]] = files.results["arms"]
    own = [found for kind, found in benchmark_sets(files.folder).items() if kind != "general"]
    mean = {arm: score["value"] for found in own for arm, score in found["mean"].items() if arm in COMPARED}
    diffs = {arm: (arms[arm]["diff"], arms[arm]["ci95"]) for arm in COMPARED if arm in arms}
    return Point(files.folder.resolve().name, files.models["source"]["name"], float(alpha), diffs, mean)
