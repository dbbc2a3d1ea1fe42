"""Residual-frozen training against what the equations say it equals, in float64 (Eqs. 15-18)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from core.training.adapters import add_lora, merge_lora
from core.training.hot_linear import HotResidualLinear, enable_hot_residual_for_model, set_trainable
from core.training.settings import AdapterSettings
from core.training.start import open_start, save_folded

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen2_vl": "qwen2vl", "llava": "tinyllava"}


def unfolded(fused, hot=True, alpha=None):
    """The start of stage 3 in float64."""
    start = open_start(str(fused))
    model = start.load(None).double()
    residuals = start.residuals
    if hot:
        residuals = [replace(r, weight=r.weight.double()) for r in residuals]
        enable_hot_residual_for_model(
            model, residuals, start.checkpoint.layout.name, start.alpha if alpha is None else alpha, start.form
        )
        set_trainable(model, "frozen_hot")
    return start, model


def descend(model, optimizer, steps):
    """Plain steps on fixed batches, the loss in float64."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(3, 400, (2, 12), generator=generator)
        logits = model(input_ids=ids).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.double().transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()


def test_alpha_zero_trains_as_the_target_alone(fused):
    weights = []
    for hot in (True, False):
        start, model = unfolded(fused, hot, 0.0)
        descend(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 20)
        weights.append({n: v for n, v in model.state_dict().items() if "hot_" not in n})
    worst = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[1])
    assert weights[0].keys() == weights[1].keys() and worst <= 1e-12
    assert not torch.equal(weights[1]["lm_head.weight"], start.load(None).double().lm_head.weight)


@pytest.mark.parametrize("way", ["beside", "through W_eff"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_interpolating_frozen_hot_is_training_from_the_folded_start(fused, kind, way, monkeypatch):
    """Their learning rates on fused weights times (1 - a)^2 for SGD, (1 - a) and epsilon / (1 - a) for Adam."""
    from core.training import hot_linear

    monkeypatch.setattr(hot_linear, "FOLD_FROM", dict.fromkeys(hot_linear.FOLD_FROM, 1e9 if way == "beside" else 0))
    start, model = unfolded(fused)
    kept = 1 - start.alpha
    assert 0 < start.alpha < 1 and start.form == "interpolate"
    hot = {n: m for n, m in model.named_modules() if isinstance(m, HotResidualLinear)}
    assert len(hot) == 12
    for module in hot.values():
        module.dense = way == "through W_eff"
    folded = start.load(None).double()
    with torch.no_grad():
        for name, module in hot.items():
            folded.get_submodule(name).weight.copy_(module.effective_weight())
    fused_names = {f"{name}.weight" for name in hot}
    inside = [p for n, p in folded.named_parameters() if n in fused_names]
    outside = [p for n, p in folded.named_parameters() if n not in fused_names]
    ours = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        optimizers = (
            torch.optim.SGD(ours, lr=0.1),
            torch.optim.SGD([{"params": inside, "lr": 0.1 * kept**2}, {"params": outside}], lr=0.1),
        )
    else:
        eps = 1e-3
        optimizers = (
            torch.optim.Adam(ours, lr=1e-2, eps=eps),
            torch.optim.Adam(
                [{"params": inside, "lr": 1e-2 * kept, "eps": eps / kept}, {"params": outside}], lr=1e-2, eps=eps
            ),
        )
    descend(model, optimizers[0], 10)
    descend(folded, optimizers[1], 10)
    for name, parameter in folded.named_parameters():
        value = (
            hot[name.removesuffix(".weight")].effective_weight()
            if name in fused_names
            else dict(model.named_parameters())[name]
        )
        assert float((value - parameter).detach().abs().max()) <= 1e-9, name
    start_weights = start.load(None).state_dict()
    assert all((folded.state_dict()[n] - start_weights[n]).abs().max() > 1e-3 for n in fused_names)


def test_lora_is_merged_to_the_function_that_was_trained(fused):
    """Rows and columns, dense and selected, in float64; the residual stays, the base takes the adapter."""
    torch.manual_seed(0)
    _, model = unfolded(fused)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    assert add_lora(model, "model", AdapterSettings(lora_rank=3, lora_targets="all-linear")) == 3 * 7
    counts = set_trainable(model, "frozen_hot", lora=True)
    assert counts["base"][0] == counts["residual"][0] == counts["adapters"][1] == 0 < counts["adapters"][0]
    model.double()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merge_lora(model)
        merged = model(input_ids=ids).logits
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name.endswith("proj.weight")), name
    assert float((adapted - merged).abs().max()) <= 1e-9 * float(merged.abs().max())
    unadapted = unfolded(fused)[1](input_ids=ids).logits
    assert float((adapted - unadapted).detach().abs().max()) > 0.1


def test_fold_unfold_fold_is_stable_to_the_bit(fused, tmp_path):
    start, _ = unfolded(fused)
    state = start.load(start.alpha).state_dict()
    (tmp_path / "again").mkdir()
    save_folded(start, tmp_path / "again", state, start.alpha, 10**9)
    for name in ("model.safetensors", "hot_residual.safetensors"):
        a, b = (load_file(folder / name) for folder in (fused, tmp_path / "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
