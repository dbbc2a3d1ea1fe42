"""Settings of fusion (stage 2)."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import UserError
from core.fusion.anchored import KINDS
from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.projections import ATTENTION, parse_projections
from core.fusion.residual import RESIDUAL_FORMS
from core.options import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, Range, option

# What alpha can be in place of a number.
CHOSEN = AUTO, LEARNED = ("auto", "learned")
_DEFAULT_P_TOPK = "".join(
    f"{count} for {' and '.join(name for name, kind in FEATURE_MAPS.items() if kind.default_p_topk == count)}, else "
    for count in sorted({kind.default_p_topk for kind in FEATURE_MAPS.values() if kind.default_p_topk})
)
_WITHOUT_FEATURE_PLANS = " or ".join(name for name, kind in FEATURE_MAPS.items() if not kind.reads_feature_plans)


@dataclass(frozen=True)
class FusionSettings:
    """Fusion: how plans become weights, and how strongly they are mixed in."""

    feature_map: str = option("coupling", "2", "how plans become linear maps (docs/method.md)", tuple(FEATURE_MAPS))
    residual_form: str = option("interpolate", "2", "(1-a) W + a W~, or W + a W~ (additive)", RESIDUAL_FORMS)
    alpha: float | str = option(
        0.1,
        "2",
        "fusion strength, 0 to 1; auto: the best of a grid on validation rows, or 0 where none reliably helps; "
        "learned: one for each layer and projection, learned on calibration texts",
        CHOSEN,
        SHARE,
    )
    top_k: int = option(
        128,
        "2",
        "strongest neurons fused per layer and projection; 0: all",
        range=Range(0, "expected 0 (all neurons) or more"),
    )
    p_topk: int | None = option(
        None,
        "2",
        f"source layers per target layer; default {_DEFAULT_P_TOPK}all with at least 1e-4 of the row of P",
        range=AT_LEAST_ONE,
    )
    q_topk: int | None = option(
        None, "2", f"entries kept per row of Q (not for {_WITHOUT_FEATURE_PLANS}); default all", range=AT_LEAST_ONE
    )
    projections: str = option(
        "q,k,v,o", "12", "what is fused: all, or a list of q, k, v, o, gate, up, down (the paper: q,k,v,o)"
    )
    rows: str = option(
        "auto",
        "2",
        "rows that regression is fitted on: aligned; anchored: also the target's positions without a partner, with its "
        "own output; difference: anchored, and only the difference to the target's output; auto: aligned or anchored "
        "by the validation rows where alpha is auto or learned, else aligned",
        ("auto", *KINDS),
    )
    ridge: float = option(0.01, "2", "lambda of the regression maps, relative to the mean diagonal", range=POSITIVE)
    alpha_steps: int = option(
        14, "2", "steps of Adam with --alpha learned", range=NOT_NEGATIVE, only_with="learned strengths"
    )
    free_alpha: bool = option(False, "2", "let learned strengths leave 0 to 1", only_with="learned strengths")

    @property
    def fused(self) -> tuple[str, ...]:
        """The names of the projections, in the order of the table. Raises UserError for an unknown one."""
        return parse_projections(self.projections)

    @property
    def finds_alpha(self) -> bool:
        """Whether the strength is chosen or learned, for which the target and texts are read."""
        return self.alpha in CHOSEN

    @property
    def row_kinds(self) -> tuple[str, ...]:
        """The kinds of rows of which one is chosen; a single one where there is no choice."""
        if self.rows != "auto":
            return (self.rows,)
        chosen = self.finds_alpha and not FEATURE_MAPS[self.feature_map].reads_feature_plans
        return ("aligned", "anchored") if chosen else ("aligned",)

    def check(self) -> None:
        """Raise UserError for settings that exclude each other."""
        parse_projections(self.projections)
        if self.q_topk is not None and not FEATURE_MAPS[self.feature_map].reads_feature_plans:
            raise UserError(f"q_topk thins out plans, which {self.feature_map} does not read; leave it out")
        if self.rows == "difference" and self.residual_form == "additive":
            raise UserError(
                "rows difference adds a difference to the target's weight, and residual_form additive would add that "
                "weight once more; take --residual-form interpolate"
            )

    def check_task_vector(self) -> None:
        """Raise UserError for settings that mean nothing where a source's difference to its base is transported."""
        if self.residual_form == "additive":
            raise UserError(
                "residual_form additive adds a whole source; with --source-base, interpolate is W + alpha times the "
                "transported difference already"
            )
        if self.rows == "difference":
            raise UserError(
                "rows difference is of a whole source; what --source-base transports is a difference already: take "
                "--rows aligned or anchored"
            )

    def check_feature_map(self) -> None:
        """Raise UserError where the feature map cannot fuse these projections, or has no rows to choose.

        Stage 1 does not ask, because it records the same for every feature map.
        """
        wide = set(self.fused) - set(ATTENTION)
        if wide and FEATURE_MAPS[self.feature_map].reads_feature_plans:
            raise UserError(
                f"projections {', '.join(sorted(wide))} have no feature plans, which {self.feature_map} reads; take "
                "--feature-map regression, or --projections q,k,v,o"
            )
        if self.rows not in ("auto", "aligned") and FEATURE_MAPS[self.feature_map].reads_feature_plans:
            raise UserError(f"rows {self.rows} is of {_WITHOUT_FEATURE_PLANS}; {self.feature_map} reads plans")
