"""Over-relaxation: how large the steps of Sinkhorn's iteration are, chosen from the errors that it shows on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from core.transport.problem import SinkhornSettings

# Sweeps over which a rate of convergence is measured.
RATE_WINDOW = 4
# Relaxing costs a few sweeps until it pays, so it begins only where more plain sweeps than this are left.
WORTH_RELAXING = 8
# A measured rate is noisy: the step is made larger only if the rate is above that of the best step by this much.
RATE_MARGIN = 0.03


@dataclass
class Relaxation:
    """Chooses the exponent w of the sweeps u <- u^(1-w) (a / Kv)^w and v <- v^(1-w) (b / K^T u)^w of one problem.

    With w = 1 a sweep is Sinkhorn's; 1 < w < 2 is over-relaxation (Thibault, Chizat, Dossal and Papadakis 2021). If a
    plain sweep contracts the error by r, the best exponent is w = 2 / (1 + sqrt(1 - r)). While the iteration is relaxed
    with exponent w and contracts by s, the plain contraction r behind it solves (s + w - 1)^2 = w^2 r s (Young's
    relation between Jacobi's method and over-relaxation), so that an exponent that was chosen too small can be raised.

    A relaxed sweep leaves neither marginal exact. Therefore the iteration goes back to plain sweeps when the error is
    close to the tolerance, and its last sweep is always plain.

    Attributes:
        settings: when the iteration stops; in `paper` mode all sweeps are plain.
        w: the exponent chosen for now.
        seen: (sweep, error) since the exponent was last changed.
    """

    settings: SinkhornSettings
    w: float = 1.0
    seen: list[tuple[int, float]] = field(default_factory=list)

    def after(self, sweep: int) -> float:
        """The exponent of the sweep that follows `sweep` sweeps."""
        plain = self.settings.paper or sweep + 1 >= self.settings.n_iters
        return 1.0 if plain else self.w

    def observe(self, sweep: int, error: float) -> None:
        """Choose the exponent anew, now that `sweep` sweeps led to this L1 marginal error."""
        tol = self.settings.tol
        if self.settings.paper:
            return
        self.seen.append((sweep, error))
        if self.w > 1 and error <= 4 * tol:
            self._change(1.0)
        elif error > 0 and tol > 0:
            rate = self._rate()
            if rate is None:
                return
            if self.w > 1:
                self._correct(rate)
            elif rate < 1 and math.log(tol / error) / math.log(rate) > WORTH_RELAXING:
                self._change(_best_exponent(rate))

    def _rate(self) -> float | None:
        """Contraction of the error per sweep, or None while too few sweeps were seen with this exponent."""
        now, error = self.seen[-1]
        start = next((one for one in reversed(self.seen) if now - one[0] >= RATE_WINDOW), None)
        return None if start is None else (error / start[1]) ** (1 / (now - start[0]))

    def _correct(self, rate: float) -> None:
        """Lower an exponent with which the error does not fall, or raise one with which it falls too slowly."""
        if rate >= 1:
            self._change(1 + (self.w - 1) / 2)
        elif rate > self.w - 1 + RATE_MARGIN:
            plain = min((rate + self.w - 1) ** 2 / (self.w**2 * rate), 0.9999)
            if _best_exponent(plain) > self.w:
                self._change(_best_exponent(plain))

    def _change(self, w: float) -> None:
        self.w, self.seen = w, []


def _best_exponent(rate: float) -> float:
    """The exponent that converges fastest where a plain sweep contracts the error by `rate`."""
    return 2 / (1 + math.sqrt(1 - rate))
