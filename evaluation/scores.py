"""Score files: one JSON file per benchmark with the score of every item, so that models are compared item by item."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import digest_of, read_json, write_json
from core.manifest import FORMAT_VERSION, provenance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The score of one model on one benchmark.

    Attributes:
        benchmark: name of the benchmark as tables have it, e.g. `belebele_ind_Latn`.
        ids: of the items, unique, in the order of the benchmark's file.
        metrics: metric -> score of every item (0 or 1 for accuracies).
        metric: the one of these that tables and tests report; it is declared, never the first by chance.
        groups: category of every item, where the benchmark reports by category.
        details: whatever else the reader of the score should know: task version, prompt, notes on the data.
    """

    benchmark: str
    ids: Sequence[str]
    metrics: Mapping[str, Sequence[float]]
    metric: str = field(kw_only=True)
    groups: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.ids)
        assert n and len(set(self.ids)) == n and all(len(values) == n for values in self.metrics.values())
        assert self.metric in self.metrics

    def means(self, items: Sequence[int]) -> dict[str, dict[str, float | int]]:
        """Metric -> `mean_and_error` over some of the items, which are given by their position."""
        return {name: mean_and_error([values[item] for item in items]) for name, values in self.metrics.items()}


def mean_and_error(values: Sequence[float]) -> dict[str, float | int]:
    """{"value": mean, "stderr": its standard error (unbiased; 0 for a single item), "n": number of items}."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return {"value": mean, "stderr": math.sqrt(variance / n), "n": n}


def finished(path: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether `path` holds the score for exactly these inputs in the present format; the log says so if it does."""
    record = read_json(path) if path.is_file() else {}
    done = (record.get("format"), record.get("fingerprint")) == (FORMAT_VERSION, digest_of(inputs))
    if done:
        log.info("%s is finished already", path)
    return done


def read_score(path: Path) -> dict[str, Any]:
    """The contents of a score file. Raises UserError for one of an earlier version, which was scored by other rules."""
    record = read_json(path)
    if record.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {record.get('format')}, expected {FORMAT_VERSION}; run the benchmark again "
            "(evaluation/run_task.py), with the same output folder"
        )
    return record


def write_score(path: Path, score: Score, inputs: Mapping[str, Any]) -> None:
    """Write a score file, atomically.

    Args:
        inputs: all that the score depends on: `EvaluatedModel.identity`, digest of the data, limit, settings.
    """
    members: dict[str, list[int]] = {}
    for item, group in enumerate(score.groups):
        members.setdefault(group, []).append(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "format": FORMAT_VERSION,
            "benchmark": score.benchmark,
            "metric": score.metric,
            "metrics": score.means(range(len(score.ids))),
            "groups": {group: score.means(items) for group, items in sorted(members.items())},
            "item_groups": list(score.groups),
            "details": dict(score.details),
            "fingerprint": digest_of(inputs),
            "inputs": dict(inputs),
            "items": {"ids": list(score.ids), **{metric: list(values) for metric, values in score.metrics.items()}},
            **provenance(),
        },
    )
