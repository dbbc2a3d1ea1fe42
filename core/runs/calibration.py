"""The calibration texts: those of the run's own data, and where it is asked for a share of general text among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.data import DataSpec, Division, Row, divide
from core.errors import UserError
from core.runs.settings import Experiment


@dataclass(frozen=True)
class Calibration:
    """The texts that both models read in stage 1, and on which strengths are learned.

    Attributes:
        division: the run's own data.
        own: the texts from it.
        general: the general text, None where no share of it is asked for.
        added: the texts from that.
    """

    division: Division
    own: list[Row]
    general: Division | None = None
    added: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All texts, the run's own first."""
        return [*self.own, *self.added]

    def identity(self) -> dict[str, Any]:
        """What manifests say of them: `Division.identity` of the run's own texts, and under `general` of the others."""
        found = self.division.identity(self.own)
        return found if self.general is None else {**found, "general": self.general.identity(self.added)}

    def marks(self) -> set[str]:
        """What no later stage may hold out (`Division.marks`)."""
        return self.division.marks(self.own) | (set() if self.general is None else self.general.marks(self.added))


def calibration_texts(division: Division, experiment: Experiment) -> Calibration:
    """The texts that stage 1 reads.

    Raises:
        UserError: general texts are asked for and none are named, or a part has no rows.
    """
    samples, share = experiment.reading.calibration_samples, experiment.reading.general_share
    added = round(share * samples)
    own = division.rows("calibration", samples - added)
    if not added:
        return Calibration(division, own)
    spec = experiment.evaluation.general_spec(experiment.data.split_seed)
    if spec is None:
        raise UserError(f"general_share is {share}, but no general text is given; name it with --general-subset")
    general = divide(spec)
    return Calibration(division, own, general, general.rows("calibration", added))


def calibration_again(division: Division, experiment: Experiment, made_from: Mapping[str, Any]) -> Calibration | None:
    """The texts that plans were made from, read again; None where the data now gives other texts.

    Args:
        division: the run's own data, read again.
        experiment: where it names general text, that is read; otherwise the one that stage 1 read.
        made_from: `Calibration.identity` of those texts.
    """
    own = division.rows("calibration", made_from["rows"])
    found = Calibration(division, own)
    if "general" in made_from:
        then = made_from["general"]
        seed = then["split_seed"]
        general = divide(experiment.evaluation.general_spec(seed) or DataSpec(then["subset"], then["file"], seed))
        found = Calibration(division, own, general, general.rows("calibration", then["rows"]))
    return found if _contents(found.identity()) == _contents(made_from) else None


def _contents(identity: Mapping[str, Any]) -> list[str]:
    """The digests of the texts, wherever they are stored."""
    return [one["sha256"] for one in (identity, identity.get("general")) if one is not None]
