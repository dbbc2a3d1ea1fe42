"""The strength alpha of fusion: one number for all projections, or one for each of them.

What a strength does to a weight is `core.fusion.residual.mix`. How strengths are chosen or learned is
`core.training.strengths`.
"""

from __future__ import annotations

from collections.abc import Mapping

from core.fusion.residual import Residual

# One strength for all projections, or `Residual.name` -> the strength of that projection. Both are plain JSON.
Strength = float | Mapping[str, float]


def strength_of(alpha: Strength, residual: Residual) -> float:
    """The strength of one projection. Raises KeyError where there is one per projection, and none for this one."""
    return alpha[residual.name] if isinstance(alpha, Mapping) else alpha


def mean_strength(alpha: Strength) -> float:
    """The strength, averaged over projections where each has its own."""
    return sum(alpha.values()) / len(alpha) if isinstance(alpha, Mapping) else alpha


def in_words(alpha: Strength) -> str:
    """A strength as logs and cards show it."""
    if not isinstance(alpha, Mapping):
        return f"{alpha:g}"
    values = alpha.values()
    return (
        f"one for each of {len(alpha)} projections, from {min(values):.3f} to {max(values):.3f}, "
        f"{mean_strength(alpha):.3f} on average"
    )
