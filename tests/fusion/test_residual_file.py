"""The residual file gives back what was written, also when it is joined from the files of layers."""

from dataclasses import replace

import pytest
import torch
from random_residuals import random_residual

from core.errors import UserError
from core.fusion.residual_file import join_residuals, load_residuals, save_residuals

TENSORS = ("index", "weight", "bias", "original_weight", "original_bias")


def residuals():
    """`o` and `q` of three layers, not in order, with and without biases of their own and fused ones."""
    q, o = random_residual(0, 2, False, False)[1], random_residual(1, 3, True, False)[1]
    eleventh, second = random_residual(0, 5, True, True)[1], random_residual(1, 6, False, False)[1]
    return [o, q, replace(eleventh, layer=11), replace(second, layer=2)]


def assert_same(a, b):
    assert (a.layer, a.projection, a.axis) == (b.layer, b.projection, b.axis)
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or torch.equal(x, y), name


def test_round_trip_in_the_order_of_layers_and_projections(tmp_path):
    o, q, eleventh, second = residuals()
    save_residuals(tmp_path / "r.safetensors", [o, q, eleventh, second], 0.4, "additive")
    loaded, alpha, form = load_residuals(tmp_path / "r.safetensors")
    assert (alpha, form) == (0.4, "additive")
    for expected, found in zip([q, o, second, eleventh], loaded, strict=True):
        assert_same(expected, found)


def test_files_of_layers_join_to_the_bytes_of_one_file(tmp_path):
    everything = sorted(residuals(), key=lambda residual: residual.layer)
    save_residuals(tmp_path / "whole.safetensors", everything, 0.4, "interpolate")
    parts = []
    for layer in (0, 2, 11):
        parts.append(tmp_path / f"{layer}.safetensors")
        save_residuals(parts[-1], [r for r in everything if r.layer == layer], 0.4, "interpolate")
    join_residuals(parts, tmp_path / "joined.safetensors", 0.4, "interpolate")
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_strength_of_each_projection_is_kept_exactly(tmp_path):
    strengths = {one.name: 0.1 / (n + 3) for n, one in enumerate(residuals())}
    save_residuals(tmp_path / "part.safetensors", residuals(), 0.0, "interpolate")
    join_residuals([tmp_path / "part.safetensors"], tmp_path / "r.safetensors", strengths, "interpolate")
    assert load_residuals(tmp_path / "r.safetensors")[1] == strengths


def test_missing_residual_file_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"generate_hot_residual\.py"):
        load_residuals(tmp_path / "none.safetensors")
