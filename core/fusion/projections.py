"""The projections that can be fused, in one table that all stages read.

A side is a point of a decoder layer at which activations are recorded and matched. Every projection lies between two:
its output side has the projection's own name, and several projections may share an input side, as q, k and v share
`attn_in`, and gate and up share `mlp_in`. Fusing another projection is another row of PROJECTIONS, whose widths the
model's layout (`core.models.families.AttentionLayout`) must have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import UserError

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Projection:
    """One linear layer of a decoder layer, with a weight W [out, in].

    Attributes:
        name: the name of the projection and of its output side.
        input_side: the name of the side that it reads.
        axis: what fusion selects and replaces: ROWS of W by the strength of the output neurons, or COLUMNS of W by the
            strength of the input neurons (section 4.2).
        path: its module, relative to the decoder layer.
        input_width, output_width: the attributes of a model's layout that hold the numbers of neurons of its two sides;
            `hidden` is the width of the residual stream.
        layer_sides: the two sides whose layer plans give P_eff (Eq. 13). For attention they are the projection's own
            input and output. For the MLP they are its two narrow ends, so that the wide sides between gate, up and down
            need no plans to match layers.
    """

    name: str
    input_side: str
    axis: int
    path: str
    input_width: str
    output_width: str
    layer_sides: tuple[str, str]

    @property
    def selected_side(self) -> str:
        """The side whose neurons are selected."""
        return self.name if self.axis == ROWS else self.input_side

    @property
    def matches_layers(self) -> bool:
        """Whether layers are matched by the projection's output, so that the source's output is recorded. That of gate
        and up is not: it is several times as wide as their input, from which it follows."""
        return self.name in self.layer_sides

    @property
    def whole_side(self) -> str:
        """The other side, of which all neurons take part."""
        return self.input_side if self.axis == ROWS else self.name


def _attention(name: str, input_side: str, axis: int, input_width: str, output_width: str) -> Projection:
    path = f"self_attn.{name}_proj"
    return Projection(name, input_side, axis, path, input_width, output_width, (input_side, name))


def _mlp(name: str, input_side: str, axis: int, input_width: str, output_width: str) -> Projection:
    return Projection(name, input_side, axis, f"mlp.{name}_proj", input_width, output_width, ("mlp_in", "down"))


# In the order of the forward pass. A neuron of the residual stream (`hidden`) has no meaning of its own; so for the
# projections that write to it, o and down, the columns are selected: the outputs of the heads, and the MLP's neurons.
PROJECTIONS = {
    projection.name: projection
    for projection in (
        _attention("q", "attn_in", ROWS, "hidden", "query_width"),
        _attention("k", "attn_in", ROWS, "hidden", "key_width"),
        _attention("v", "attn_in", ROWS, "hidden", "key_width"),
        _attention("o", "o_in", COLUMNS, "query_width", "hidden"),
        _mlp("gate", "mlp_in", ROWS, "hidden", "inner_width"),
        _mlp("up", "mlp_in", ROWS, "hidden", "inner_width"),
        _mlp("down", "down_in", COLUMNS, "inner_width", "hidden"),
    )
}
# What the paper fuses.
ATTENTION = ("q", "k", "v", "o")
# Side -> what a layout calls its number of neurons.
WIDTHS = {projection.name: projection.output_width for projection in PROJECTIONS.values()} | {
    projection.input_side: projection.input_width for projection in PROJECTIONS.values()
}


def parse_projections(text: str) -> tuple[str, ...]:
    """`q,k,v,o`, `all` or any list as names in the order of the table. Raises UserError for an unknown name."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if names == {"all"}:
        return tuple(PROJECTIONS)
    unknown = sorted(names - PROJECTIONS.keys())
    if unknown or not names:
        raise UserError(f"projections is {text!r}; expected all, or a list of {', '.join(PROJECTIONS)}")
    return tuple(name for name in PROJECTIONS if name in names)


def recorded_sides(projections: Iterable[str]) -> tuple[str, ...]:
    """What is recorded for some projections: their outputs, their inputs, and the sides from which layers are matched.

    This is the order on disk.
    """
    found = [PROJECTIONS[name] for name in projections]
    ends = [*(one.name for one in found), *(one.input_side for one in found)]
    return tuple(dict.fromkeys([*ends, *(side for one in found for side in one.layer_sides)]))


def planned_sides(projections: Iterable[str]) -> tuple[str, ...]:
    """Those of the recorded sides from whose plans layers are matched."""
    projections = tuple(projections)
    needed = {side for name in projections for side in PROJECTIONS[name].layer_sides}
    return tuple(side for side in recorded_sides(projections) if side in needed)


def source_sides(projections: Iterable[str], all_inputs: bool) -> tuple[str, ...]:
    """What is recorded of the source: the sides from whose plans layers are matched. The wide sides of the MLP are not
    among them: the outputs of gate and up follow from their input, and only a task vector needs the input of down.

    Args:
        all_inputs: whether the inputs of all projections are recorded, as a task vector needs.
    """
    projections = tuple(projections)
    needed = set(planned_sides(projections))
    if all_inputs:
        needed |= {PROJECTIONS[name].input_side for name in projections}
    return tuple(side for side in recorded_sides(projections) if side in needed)


def forward_order(side: str) -> int:
    """The place of a side in the forward pass of a layer."""
    order = [end for projection in PROJECTIONS.values() for end in (projection.input_side, projection.name)]
    return order.index(side)


def first_reader(side: str) -> str:
    """The first projection that reads a side, at which the side is recorded."""
    return next(name for name, one in PROJECTIONS.items() if one.input_side == side)


def selected_sides(projections: Iterable[str]) -> set[str]:
    """The sides on which some projections select neurons."""
    return {PROJECTIONS[name].selected_side for name in projections}
