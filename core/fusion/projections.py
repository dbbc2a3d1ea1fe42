"""The projections that fusion knows, each with the sides it lies between, in one table.

A side is a place in a decoder layer where activations are recorded and matched. The output side of a projection has the
projection's name; q, k and v share the input side `attn_in`.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Projection:
    """One linear layer of a decoder layer, W [out, in].

    Attributes:
        name: of the projection and of its output side.
        input_side: the side it reads.
        axis: what fusion selects and replaces: ROWS of W, by the strength of the outputs, or COLUMNS, by that of the
            inputs.
        path: its module below a decoder layer.
        input_width, output_width: what the model's layout calls the number of neurons on either side.
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
        """The other side, all of whose neurons take part."""
        return self.input_side if self.axis == ROWS else self.name


# In the order of the forward pass. `o` and `hidden` belong to the residual stream, where a neuron of the output has no
# meaning of its own; so for o the columns are selected, which are the outputs of the heads.
PROJECTIONS = {
    projection.name: projection
    for projection in (
        Projection("q", "attn_in", ROWS, "self_attn.q_proj", "hidden", "query_width"),
        Projection("k", "attn_in", ROWS, "self_attn.k_proj", "hidden", "key_width"),
        Projection("v", "attn_in", ROWS, "self_attn.v_proj", "hidden", "key_width"),
        Projection("o", "o_in", COLUMNS, "self_attn.o_proj", "query_width", "hidden"),
    )
}
# Input side -> the first projection that reads it, at which it is recorded.
READ_BY = {projection.input_side: name for name, projection in reversed(PROJECTIONS.items())}
# Side -> what a layout calls its number of neurons. Output sides come first: this is the order of files on disk.
SIDES = {projection.name: projection.output_width for projection in PROJECTIONS.values()} | {
    projection.input_side: projection.input_width for projection in PROJECTIONS.values()
}
# The order in which a forward pass reaches the sides.
FORWARD_ORDER = tuple(
    dict.fromkeys(side for projection in PROJECTIONS.values() for side in (projection.input_side, projection.name))
)
# The sides whose neurons are selected by some projection.
SELECTED_SIDES = {projection.selected_side for projection in PROJECTIONS.values()}
