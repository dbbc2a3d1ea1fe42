"""Every model family, as target and as source, through the two commands."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_main
from family_models import MAKERS, fuse_pair, logits, make, stock
from safetensors.torch import load_file
from stages import killed
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core import train_hot_residual_sft as stage3
from core.fusion.projections import ATTENTION, recorded_sides
from core.fusion.residual_file import load_residuals
from core.models.checkpoints import open_checkpoint
from core.models.families import EVEN_HEADS, attention_layout, stated_layout
from core.runs.plan_directory import PlanDirectory
from core.training.hot_linear import enable_hot_residual_for_model, restore_base

NAMES = (
    "llama31",
    "mistral",
    "qwen3",
    "gemma3_text",
    "gemma3",
    "qwen2_vl",
    "qwen2_5_vl",
    "llava",
    "llava_llama",
    "llava_next",
    "llava_onevision",
)


def check_fused(target: Path, out: Path, trust: bool = False) -> None:
    before, after = load_file(target / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    checkpoint = open_checkpoint(str(out), None, trust)
    residuals, alpha, form = load_residuals(out / "hot_residual.safetensors")
    fused = {checkpoint.tensor_name(r.layer, r.projection) + ".weight": r for r in residuals}
    assert len(fused) == len(ATTENTION) * checkpoint.layout.n_layers
    for name, tensor in before.items():
        if name not in fused:
            biases = {other.replace(".weight", ".bias") for other in fused}
            assert torch.equal(tensor, after[name]) or name in biases, name
            continue
        axis, index = fused[name].axis, fused[name].index
        rest = torch.tensor([i for i in range(tensor.shape[axis]) if i not in index.tolist()])
        assert torch.equal(tensor.index_select(axis, rest), after[name].index_select(axis, rest)), name
        assert not torch.equal(tensor, after[name])
    folded = stock(out, trust)
    unfolded = checkpoint.load_model("float32")
    restore_base(unfolded, residuals, checkpoint.layout.name)
    assert torch.equal(logits(unfolded), logits(stock(target, trust)))
    enable_hot_residual_for_model(unfolded, residuals, checkpoint.layout.name, alpha, form)
    assert_close(logits(unfolded), logits(folded), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_as_target_and_as_source(name, models, texts, tmp_path):
    own = make(name, tmp_path / "own")
    layout = open_checkpoint(str(own)).layout
    for role in ("target", "source"):
        pair = {"target": models["other"], "source": models["source"]} | {role: own}
        plans, out = fuse_pair(pair["target"], pair["source"], texts, tmp_path / role)
        widths = load_file(plans / "activations" / f"{role}.safetensors")
        model = stock(own)
        for side in recorded_sides(ATTENTION):
            linear = layout.linear(model, 1, side[0] if side in "qkvo" else {"attn_in": "q", "o_in": "o"}[side])
            neurons = linear.out_features if side in "qkvo" else linear.in_features
            assert layout.size(side) == neurons == widths[f"{side}.1"].shape[1]
        assert PlanDirectory(plans).shape[0 if role == "target" else 1] == layout.n_layers == 3
        check_fused(pair["target"], out)


def test_rows_are_the_inputs_and_outputs_of_the_language_tower(texts, tmp_path, models):
    """The hooks sit in the text decoder, not in the vision tower that has projections of the same names."""
    own = make("llava", tmp_path / "own")
    plans, _ = fuse_pair(own, models["source"], texts, tmp_path)
    rows = load_file(plans / "activations" / "target.safetensors")["v.2"]
    tokenizer, decoder, seen = open_checkpoint(str(own)).load_tokenizer(), stock(own).model.language_model, []
    decoder.layers[2].self_attn.v_proj.register_forward_hook(lambda _m, _x, y: seen.append(y.mean(1)))
    with torch.no_grad():
        for line in texts.read_text().splitlines():
            decoder(input_ids=torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:16]]))
    nearest = (rows[:, None] - torch.cat(seen)).abs().amax(2).amin(1)
    assert float(nearest.max()) <= 1e-4  # every stored row is the mean over the tokens of one of the texts


def test_disk_names_of_both_conventions_are_found(tmp_path):
    """Published files spell the tower in the old way, files saved under the new names are read as well."""
    from safetensors.torch import save_file

    old = make("qwen2_vl", tmp_path / "old")
    assert open_checkpoint(str(old)).tower == "model"
    tensors = load_file(old / "model.safetensors")
    new = tmp_path / "new"
    new.mkdir()
    for file in old.iterdir():
        if file.name != "model.safetensors":
            (new / file.name).write_bytes(file.read_bytes())
    renamed = {
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, new / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(new))
    assert checkpoint.tower == "model.language_model"
    assert torch.equal(checkpoint.weight(1, "k"), open_checkpoint(str(old)).weight(1, "k"))
    assert torch.equal(logits(stock(new)), logits(stock(old)))
    for folder in (old, new):
        checkpoint = open_checkpoint(str(folder))
        in_model = set(stock(folder).state_dict())
        text = [name for name in checkpoint.headers if "visual" not in name]
        assert text and all(checkpoint.name_in_model(name) in in_model for name in text)


def plan_flags(target, source, texts, plans):
    """The flags of stage 1 for two models and a file of texts."""
    models = ("--target-model", target, "--source-model", source)
    return [*models, "--data-subset", "file", "--data-file", texts, "--out-dir", plans]


def test_tinyllava_only_on_request(models, texts, tmp_path, fails, monkeypatch):
    own = make("tinyllava", tmp_path / "own")
    flags = plan_flags(own, models["source"], texts, tmp_path / "p")
    assert "allow it with --trust-remote-code" in fails(stage1, *flags)
    _, out = fuse_pair(own, models["source"], texts, tmp_path / "ok", "--trust-remote-code")
    check_fused(own, out, trust=True)
    config = json.loads((own / "config.json").read_text())
    config.pop("auto_map")
    (own / "config.json").write_text(json.dumps(config))
    told = fails(stage1, *flags, "--trust-remote-code")
    assert "the package tinyllava is not installed; install it" in told


def test_towers_without_the_projections_are_refused(tmp_path, fails, models, texts):
    folder = make("llava", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(config))
    told = fails(stage1, *plan_flags(folder, models["source"], texts, tmp_path / "p"))
    assert "the language tower is a gpt2 model; supported towers: gemma3_text, llama" in told


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "tinyllava"])
def test_training_moves_the_language_tower_alone_and_resumes_to_the_same_weights(
    name, models, texts, tmp_path, monkeypatch
):
    trust = ["--trust-remote-code"] if name == "tinyllava" else []
    own = make(name, tmp_path / "own")
    _, fused = fuse_pair(own, models["source"], texts, tmp_path, *trust)
    flags = [
        "--model_dir",
        fused,
        "--sft-samples",
        8,
        "--gradient-accumulation",
        2,
        "--learning-rate",
        "1e-2",
        "--save-steps",
        1,
        *trust,
    ]
    run_main(stage3, *flags, "--output_dir", tmp_path / "whole")

    with killed(monkeypatch, "on_step_end", lambda state, _: state.global_step == 3):
        run_main(stage3, *flags, "--output_dir", tmp_path / "part")
    assert (tmp_path / "part" / "checkpoints/trial0/checkpoint-2").is_dir()
    run_main(stage3, *flags, "--output_dir", tmp_path / "part")
    before, whole, part = (load_file(tmp_path / folder / "model.safetensors") for folder in ("f", "whole", "part"))
    assert before.keys() == whole.keys()
    moved = {key for key in before if not torch.equal(before[key], whole[key])}
    checkpoint = open_checkpoint(str(own), None, bool(trust))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert all(key.startswith((checkpoint.tower + ".", *checkpoint.layout.family.heads_on_disk)) for key in moved)
    assert len(moved) > 3 * 7 and not any("vis" in key for key in moved)
    stock(tmp_path / "whole", bool(trust))


@pytest.mark.parametrize("name", ["llama", "qwen2", *NAMES])
def test_a_stated_layout_is_that_of_the_config(name):
    """Of text models, whether or not they state the width of a head; and none where transformers' defaults decide."""
    config = MAKERS[name]().config.to_dict()
    expected = attention_layout(config, name)
    if "text_config" in config:
        assert stated_layout(config) is None
        return
    assert stated_layout(config) == expected
    even = {key: value for key, value in config.items() if key != "head_dim"}
    left_out = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    assert stated_layout(left_out) is None
    assert stated_layout(even) == (attention_layout(even, name) if config["model_type"] in EVEN_HEADS else None)
