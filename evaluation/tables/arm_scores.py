"""The benchmark scores of one arm of a run, read from its score files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, read_json
from evaluation.arms.run import TRAINED, training_folders
from evaluation.benchmarks.registry import TASK_FILE
from evaluation.scores import read_score


@dataclass(frozen=True)
class ArmScore:
    """One arm on one benchmark.

    Attributes:
        metric: the one that the tables report.
        ids: of the items.
        runs: the score of every item, one list per seed, or a single one for a model that was not trained.
        categories: category of every item; empty where the benchmark does not report by category.
        note: what a reader has to know, such as that it stands in for another benchmark.
        prompt: how the model was prompted, in words.
        in_place_of: the benchmark that it stands in for; its own name where it stands in for none.
        model: identity of the model that was scored, of one of the seeds.
        made: seed, or the arm itself -> fingerprint of the checkpoint of ours that was scored; None for another model.
        inputs: all that two arms have to share for their scores to be compared: everything but the model.
    """

    metric: str
    ids: Sequence[str]
    runs: list[Sequence[float]]
    categories: Sequence[str] = ()
    note: str = ""
    prompt: str | None = None
    in_place_of: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    made: dict[str, str | None] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def same_items(self, other: ArmScore) -> bool:
        """Whether both were scored on the same items in the same way."""
        return self.ids == other.ids and self.inputs == other.inputs


# Benchmark -> its score, or why there is none.
ArmScores = Mapping[str, ArmScore | str]


def present(scores: Mapping[str, ArmScore | str]) -> dict[str, ArmScore]:
    """Those benchmarks of an arm that have a score."""
    return {name: score for name, score in scores.items() if isinstance(score, ArmScore)}


def arm_scores(run: Path, shared: Path, kind: str, arm: str) -> ArmScores:
    """The scores of one arm on the benchmarks of a task.

    All trainings in the run's folder have to be scored: otherwise a mean over some seeds would stand beside one over
    all of them. The result is empty where the arm was not run.

    Args:
        run: folder of the run.
        shared: folder of the run that has the scores of the base.
        kind: name of the task, or `general`.
    Raises:
        UserError: a score file is of an earlier version, or seeds were scored on different items.
    """
    folder = (shared if arm == "base" else run) / "benchmarks" / kind / arm
    files = sorted(folder.glob(f"seed*[0-9]/{TASK_FILE}" if arm in TRAINED else TASK_FILE))
    records = {file.parent: read_json(file) for file in files}
    scores: dict[str, ArmScore | str] = dict(_not_scored_for_every_seed(run, arm, records))
    for seed_folder, record in records.items():
        for name, result in record["benchmarks"].items():
            if "absent" in result:
                scores[name] = result["absent"]
            if isinstance(scores.get(name), str):  # absent for this seed, or for another one
                continue
            score = _read(seed_folder / result["file"], name, result, record["limit"])
            first = scores.setdefault(name, score)
            assert isinstance(first, ArmScore)
            if not first.same_items(score):
                raise UserError(f"{seed_folder / result['file']} has other items than another seed's; run it again")
            if first is not score:
                first.runs.extend(score.runs)
                first.made.update(score.made)
    return scores


def _not_scored_for_every_seed(run: Path, arm: str, records: Mapping[Path, Mapping[str, Any]]) -> dict[str, str]:
    """Benchmark that some seeds of an arm have and others lack -> which lack it.

    Args:
        records: folder of a seed's scores -> its task file.
    """
    unscored = []
    if arm in TRAINED:
        trained = {folder.name for folder in training_folders(run, arm) if (folder / MANIFEST).is_file()}
        unscored = sorted(trained - {seed_folder.name for seed_folder in records})
    lacking = {}
    for name in dict.fromkeys(name for record in records.values() for name in record["benchmarks"]):
        seeds = [
            *unscored,
            *(seed_folder.name for seed_folder, record in records.items() if name not in record["benchmarks"]),
        ]
        if seeds:
            lacking[name] = f"not run for {', '.join(seeds)}"
    return lacking


def _read(file: Path, name: str, result: Mapping[str, Any], limit: int | None) -> ArmScore:
    """A score file of one seed.

    Args:
        result: the entry of the benchmark in the task file.
        limit: of the task file.
    """
    score = read_score(file)
    metric, inputs = score["metric"], score["inputs"]
    notes = (
        f"in place of {result['stands_in_for']}" if "stands_in_for" in result else "",
        f"first {limit} items of each file" if limit else "",
        score["details"].get("metric_note"),
    )
    computed = {key: inputs["model"].get(key) for key in ("dtype", "device")}
    return ArmScore(
        metric=metric,
        ids=score["items"]["ids"],
        runs=[score["items"][metric]],
        categories=score["item_groups"],
        note="; ".join(note for note in notes if note),
        prompt=score["details"].get("prompt_policy"),
        in_place_of=result.get("stands_in_for", name),
        model=inputs["model"],
        made={file.parent.name: inputs["model"].get("made")},
        inputs={**{key: value for key, value in inputs.items() if key != "model"}, **computed},
    )
