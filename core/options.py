"""Settings declared once: a field of a frozen dataclass that knows its flag, its range and what its value changes.

`core.runs.settings.Experiment` consists of groups of such fields. Command lines, `--help`, experiment files, the checks
of values and the fingerprints of output folders are all read from these declarations, so a new setting is one line.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from core.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Attributes:
        low, high: the bounds, both included.
        expected: how an error message describes the range.
        above: whether `low` itself is excluded.
    """

    low: float
    expected: str
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (value > self.low if self.above else value >= self.low) and value <= self.high


SHARE = Range(0, "expected a number from 0 to 1", high=1)
POSITIVE = Range(0, "expected a positive number", above=True)
AT_LEAST_ONE = Range(1, "expected at least 1")
NOT_NEGATIVE = Range(0, "expected 0 or more")


def option(
    default: Any,
    stages: str,
    help: str,
    choices: Sequence[str] | None = None,
    range: Range | None = None,
    changes: str | None = None,
    only_with: str | None = None,
    alias: str | None = None,
) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        default: its value where neither the experiment file nor a flag gives one.
        stages: the commands that take it as a flag: 1, 2 and 3 are the stages, e is the comparison on held-out texts
            and b the benchmarks. A setting of no command can still stand in an experiment file.
        help: what `--help` says.
        choices, range: the values it may have; for a tuple, the values that each entry may have. A number that has
            both may also be one of these words.
        changes: those of `stages` whose output gets other bytes when the value changes; there the value is part of the
            fingerprint. The default is all of `stages`. Fewer are given for a setting that names an input (a model or
            rows), whose contents are in the fingerprint instead, and for one that only decides where or how fast
            something is done.
        only_with: the condition (a key of `core.runs.settings.CONDITIONS`) without which the value changes nothing;
            None when it always matters.
        alias: a second name that flags and experiment files may use.
    """
    return field(
        default=default,
        metadata={
            "stages": stages,
            "help": help,
            "choices": tuple(choices) if choices else None,
            "range": range,
            "changes": stages if changes is None else changes,
            "only_with": only_with,
            "alias": alias,
        },
    )


@dataclass(frozen=True)
class Setting:
    """One declared setting.

    Attributes:
        group: the attribute of the experiment that holds it; empty for the experiment itself.
        kind: str, int, float, bool, or tuple, whose entries have the type `entry`.
        optional: whether it may be None.
        default, stages, help, choices, range, changes, only_with, alias: as `option` takes them.
    """

    group: str
    name: str
    kind: type
    entry: type | None
    optional: bool
    default: Any
    stages: str
    help: str
    choices: tuple[str, ...] | None
    range: Range | None
    changes: str
    only_with: str | None
    alias: str | None

    def read(self, value: Any) -> Any:
        """Convert a value from YAML to this setting's type. YAML reads `2e-5` as a string and `1` as an integer, and
        both are meant as floats where the setting is one.

        Raises:
            ValueError: the value has another type; the message says what was expected.
        """
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            return self._read_entries(value)
        if value in self.words:
            return value
        if self.kind is bool or isinstance(value, bool):
            if self.kind is bool and isinstance(value, bool):
                return value
        else:
            try:
                if self.kind is not int or float(value) == int(value):
                    return self.kind(value)
            except (TypeError, ValueError, OverflowError):
                pass
        raise ValueError(f"expected {' or '.join([self.kind.__name__, *self.words])}")

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a number may be in place of a number."""
        return self.choices if self.choices and self.range else ()

    def _read_entries(self, value: Any) -> tuple[Any, ...]:
        if self.entry is str:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return tuple(value)
            raise ValueError("expected a list of names")
        try:
            return numbers(",".join(map(str, value)) if isinstance(value, list) else str(value))
        except ValueError:
            raise ValueError("expected a list of numbers") from None

    def check(self, value: Any) -> None:
        """Raise UserError for a value that is not among `choices` or not in `range`."""
        if value in self.words:
            return
        if self.choices and not self.range and value not in (None, "", *self.choices):
            raise UserError(f"{self.name} is {value!r}; expected one of {', '.join(self.choices)}")
        if self.range is not None and value is not None:
            for number in value if self.kind is tuple else (value,):
                if number not in self.range:
                    words = "".join(f", or {word}" for word in self.words)
                    raise UserError(f"{self.name} is {number}; {self.range.expected}{words}")


def settings_of(group: type, name: str) -> list[Setting]:
    """The settings that a dataclass declares with `option`, as those of the group `name`. Other fields are left out."""
    hints = get_type_hints(group)
    return [
        Setting(group=name, name=f.name, default=f.default, **_type_of(hints[f.name]), **f.metadata)
        for f in dataclasses.fields(group)
        if f.metadata
    ]


def _type_of(hint: Any) -> dict[str, Any]:
    """Type, type of entries and optionality that an annotation such as `float | None` or `tuple[str, ...]` states. Of
    `float | str`, a number or a word, it is the number's."""
    optional = type(None) in get_args(hint)
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is tuple:
        return {"kind": tuple, "entry": get_args(hint)[0], "optional": optional}
    return {"kind": hint, "entry": None, "optional": optional}


def numbers(text: str) -> tuple[float, ...]:
    """Read `0.03,0.1` as (0.03, 0.1). Raises ValueError for anything that is not a number."""
    return tuple(float(part) for part in text.split(",") if part.strip())
