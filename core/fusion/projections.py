"""The projections that are fused, in one table that all stages read.

A side is a point of a decoder layer at which activations are recorded and matched. Every projection lies between two:
its output side has the projection's own name, and several projections may share an input side, as q, k and v share
`attn_in`. Fusing another projection is another row of PROJECTIONS, whose widths the model's layout
(`core.models.families.AttentionLayout`) must have.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    name: str
    input_side: str
    axis: int
    path: str
    input_width: str
    output_width: str

    @property
    def selected_side(self) -> str:
        """The side whose neurons are selected."""
        return self.name if self.axis == ROWS else self.input_side

    @property
    def whole_side(self) -> str:
        """The other side, of which all neurons take part."""
        return self.input_side if self.axis == ROWS else self.name


# Projection by name, in the order of the forward pass. The outputs of o are added to the residual stream, where a
# single neuron has no meaning of its own, so for o the inputs are selected, which are the outputs of the heads.
PROJECTIONS = {
    projection.name: projection
    for projection in (
        Projection("q", "attn_in", ROWS, "self_attn.q_proj", "hidden", "query_width"),
        Projection("k", "attn_in", ROWS, "self_attn.k_proj", "hidden", "key_width"),
        Projection("v", "attn_in", ROWS, "self_attn.v_proj", "hidden", "key_width"),
        Projection("o", "o_in", COLUMNS, "self_attn.o_proj", "query_width", "hidden"),
    )
}
# Input side -> the first projection that reads it, at whose module the side is recorded. The table is read backwards
# because of several readers the last one that is seen stays.
FIRST_READER = {projection.input_side: name for name, projection in reversed(PROJECTIONS.items())}
# Side -> the attribute of a layout that holds its number of neurons. Plans are made and listed in this order.
SIDES = {projection.name: projection.output_width for projection in PROJECTIONS.values()} | {
    projection.input_side: projection.input_width for projection in PROJECTIONS.values()
}
# The sides in the order in which a forward pass reaches them.
FORWARD_ORDER = tuple(
    dict.fromkeys(side for projection in PROJECTIONS.values() for side in (projection.input_side, projection.name))
)
# The sides whose neurons are selected by some projection.
SELECTED_SIDES = {projection.selected_side for projection in PROJECTIONS.values()}
