"""A target and the same model with its neurons in another order, as Corollary 4.2 has them."""

from typing import Any

import torch
from conftest import llama

SQUARE = dict(head_dim=8, num_key_value_heads=3, hidden_size=24, num_hidden_layers=2)
CHANNELS = torch.randperm(24, generator=torch.Generator().manual_seed(5))
NEURONS = torch.randperm(48, generator=torch.Generator().manual_seed(5))  # of the MLP


def permuted(target: Any, mlp: bool = False) -> Any:
    """The same model with its hidden channels and its heads in another order, and with `mlp` the MLP's neurons, too."""
    heads = torch.tensor([2, 0, 1])
    in_heads = (heads[:, None] * 8 + torch.arange(8)).flatten()
    inner = NEURONS if mlp else torch.arange(48)
    state = {}
    for name, value in target.state_dict().items():
        if name.endswith("o_proj.weight"):
            value = value[CHANNELS][:, in_heads]
        elif "self_attn" in name:
            value = value[in_heads][:, CHANNELS]
        elif name.endswith("down_proj.weight"):
            value = value[CHANNELS][:, inner]
        elif "mlp" in name:
            value = value[inner][:, CHANNELS]
        elif value.ndim == 1:
            value = value[CHANNELS]
        else:
            value = value[:, CHANNELS]
        state[name] = value
    source = llama(**SQUARE)
    source.load_state_dict(state)
    return source
