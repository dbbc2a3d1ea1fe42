"""The runs beside a run that differ from it in one thing alone: the strength of fusion, or the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.fusion.strengths import mean_strength
from evaluation.figures.sensitivity import Point
from evaluation.pages.benchmark_scores import benchmark_sets, task_of
from evaluation.pages.run_files import RunFiles, is_run

COMPARED = ("fused", "fused_adapted")


def siblings(files: RunFiles) -> tuple[list[Point], list[Point]]:
    """(runs that differ in alpha alone, runs that differ in the source alone), each with the run itself; a list is
    empty where no other run is in it. Runs that were trained with other settings take part with the fused model alone.
    """
    if files.fused is None or files.results is None:
        return [], []
    ours = _made_from(files)
    strengths, sources = [], []
    for folder in sorted(files.folder.resolve().parent.glob("*/")):
        other = files if folder == files.folder.resolve() else _read(folder)
        if other is None or other.fused is None or other.results is None:
            continue
        theirs = _made_from(other)
        same = {key for key in ours if ours[key] == theirs[key]}
        if not {"task", "data", "target", "settings"} <= same:
            continue
        point = point_of(other, COMPARED if "trainings" in same else COMPARED[:1])
        if {"source", "plans"} <= same and isinstance(theirs["alpha"], int | float):
            strengths.append(point)
        if {"alpha", "matching"} <= same and theirs["matching"] is not None:
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
    inputs, plans = files.fused.inputs, files.plans
    settings = dict(inputs["settings"])
    alpha = settings.pop("alpha")
    return {
        "task": task_of(files.folder),
        "data": files.results["inputs"]["data"]["sha256"],
        "target": inputs["target"]["weights"],
        "source": inputs["source"]["weights"],
        "plans": inputs["plans"],
        "matching": None if plans is None else (plans.manifest.inputs["settings"], plans.manifest.inputs["data"]),
        "trainings": [
            {**found.inputs["settings"], "seed": None}
            for arm, found in files.trainings.items()
            if arm.startswith("fused_adapted/")
        ],
        "alpha": alpha,
        "settings": settings,
    }


def point_of(files: RunFiles, compared: Sequence[str]) -> Point:
    """What a run adds to a comparison of some arms. A strength that was found is averaged over projections."""
    assert files.fused is not None and files.results is not None
    found = files.fused.record.get("strength")
    alpha = files.fused.inputs["settings"]["alpha"] if found is None else mean_strength(found["alpha"])
    arms: Mapping[str, Mapping[str, Any]] = files.results["arms"]
    own = [benchmarks for kind, benchmarks in benchmark_sets(files.folder).items() if kind != "general"]
    mean = {arm: score["value"] for one in own for arm, score in one["mean"].items() if arm in compared}
    diffs = {arm: (arms[arm]["diff"], arms[arm]["ci95"]) for arm in compared if arm in arms}
    return Point(files.folder.resolve().name, files.models["source"]["name"], float(alpha), diffs, mean)
