"""`--plan-only`: what stage 1 costs, from two configs alone."""

import dataclasses
import re
import shutil

import pytest
from conftest import run_main
from stages import data_flags, pair_flags

import run_activs_and_hot as stage1
from core.fusion.projections import ATTENTION, PROJECTIONS, recorded_sides, source_sides
from core.models.activations import row_bytes
from core.models.settings import ComputeSettings
from core.runs import cost
from core.runs.model_size import ModelSize, read_model_size
from core.runs.plan_directory import PlanDirectory
from core.runs.settings import Experiment


@pytest.fixture
def configs(models, tmp_path):
    """Folders that hold a config.json and nothing else."""
    folders = {name: tmp_path / name for name in ("target", "source")}
    for name, folder in folders.items():
        folder.mkdir()
        shutil.copy(models[name] / "config.json", folder)
    return folders


def size(path, **compute) -> ModelSize:
    return read_model_size(str(path), None, ComputeSettings(**compute))


def save_gguf(path):
    """A GGUF file of a LLaMA of 2 layers with tied embeddings, hidden size 16, 4 heads of 4, and 50 tokens."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(50)
    shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16), "ffn_gate": (32, 16)}
    shapes |= {"ffn_up": (32, 16), "ffn_down": (16, 32), "attn_norm": (16,), "ffn_norm": (16,)}
    for layer in range(2):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float32))
    for name, shape in (("token_embd", (50, 16)), ("output_norm", (16,))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def sizes(configs):
    """The sizes of the target and of the source."""
    return tuple(map(size, configs.values()))


def test_plan_only_counts_what_stage_1_will_write(configs, sizes, plans, capsys):
    pair = ["--target-model", configs["target"], "--source-model", configs["source"] / "config.json"]
    run_main(stage1, *pair, "--plan-only", "--pooling", "token", "--max-rows", 1000, "--max-tokens", 24)
    printed = capsys.readouterr().out
    assert re.search(r"q +36 x 32 +12 ", printed) and re.search(r"v +12 x 16 +12 ", printed)
    assert re.search(r"plans +72 ", printed)
    rows = PlanDirectory(plans["token"]).manifest.record["rows"]
    estimate = cost.stage1_cost(*sizes, Experiment.of(pooling="token", max_rows=rows))
    written = sum(path.stat().st_size for path in plans["token"].rglob("*.safetensors"))
    assert estimate.rows == rows
    assert written / 1.5 <= estimate.disk <= written * 1.5
    side = estimate.sides[0]
    assert side.flops == 12 * (2 * 36 * 32 * rows + 4 * 36 * 32 * estimate.iterations)
    assert estimate.seconds == estimate.reading_seconds + sum(side.seconds for side in estimate.sides) > 0


def test_the_cost_of_reading_has_what_each_model_records(sizes):
    """With token pooling the target reads twice, and the source's input of down is for task vectors alone."""
    target, source = sizes
    few = {"calibration_samples": 20, "max_tokens": 50, "max_rows": 100, "projections": "all"}

    def of(**more):
        return cost.stage1_cost(target, source, Experiment.of(**few, **more), timed=False)

    text, token, expert = of(), of(pooling="token"), of(source_base="base")
    assert text.reading_flops == 2 * 1000 * (target.layer_parameters + source.layer_parameters)
    assert token.reading_flops - text.reading_flops == 2 * 1000 * target.layer_parameters
    assert expert.disk - text.disk == row_bytes(source.layout, 20, ("down_in",))
    whole, plans = recorded_sides(PROJECTIONS), text.disk - row_bytes(target.layout, 20, recorded_sides(PROJECTIONS))
    of_source = source_sides(PROJECTIONS, all_inputs=False)
    assert not {"gate", "up", "down_in"} & set(of_source)
    plans -= row_bytes(source.layout, 20, of_source)
    rows = 2 * row_bytes(target.layout, 100, whole) + row_bytes(source.layout, 100, of_source)
    assert token.disk == rows / 2 + plans


def test_rows_beyond_the_budget_take_no_memory(sizes, monkeypatch):
    monkeypatch.setattr(cost, "CALIBRATION_S", 0.1)
    rows = 4 * 4000 * 4 * (2 * 16 + 4 * 32)  # of the source: 4000 rows, 4 layers, sides k, v and the four others
    few = {"calibration_samples": 4000, "pairs_budget_mb": 1}
    memory = [
        cost.stage1_cost(*sizes, Experiment.of(activations_budget_mb=budget, **few)).memory
        for budget in (rows // 2**20 + 1, 0)
    ]
    assert memory[1] < memory[0] - rows / 2


def test_parameters_are_those_of_the_model(configs):
    from conftest import llama

    read = size(configs["target"])
    assert read.parameters == sum(p.numel() for p in llama().parameters())
    assert read.other_parameters == 400 * 24 + 24  # tied embeddings and the last norm
    assert read.parameter_bytes == 4 and size(configs["target"], dtype="bfloat16").parameter_bytes == 2


def test_headers_of_weights_give_the_same_counts_and_build_no_model(configs, models, tmp_path, monkeypatch):
    """Of a folder, of several files, and of an index whose files are not all here, for which the config has to do."""
    from transformers import AutoModelForCausalLM

    expected = {name: dataclasses.replace(size(folder), name="") for name, folder in configs.items()}
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(models["source"]).save_pretrained(sharded, max_shard_size="40KB")
    incomplete = shutil.copytree(sharded, tmp_path / "incomplete")
    next(incomplete.glob("*.safetensors")).unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert dataclasses.replace(size(incomplete), name="") == expected["source"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_: pytest.fail("a model was built"))
    for name, folder in (("target", models["target"]), ("source", models["source"]), ("source", sharded)):
        assert dataclasses.replace(size(folder), name="") == expected[name]


def test_the_list_of_tensors_of_a_gguf_file_gives_its_counts(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_: pytest.fail("a model was built"))
    read = size(save_gguf(tmp_path / "m.gguf"))
    assert read.layout.n_layers == 2 and read.layout.hidden == 16
    # Per layer q and o, k and v with half as many heads, three MLP weights and two norms. Embeddings are tied.
    assert read.layer_parameters == 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32 + 2 * 16)
    assert read.other_parameters == 50 * 16 + 16


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"x" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 60])
def test_a_broken_gguf_file_is_an_error(content, configs, fails, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    flags = ["--target-model", configs["target"], "--source-model", tmp_path / "m.gguf"]
    assert "m.gguf is not a GGUF file of a language model" in fails(stage1, *flags, "--plan-only")


def test_paper_mode_and_epsilon_decide_the_iterations():
    def iterations(**changes):
        return cost.usual_iterations(Experiment.of(**changes))

    assert iterations(sinkhorn_mode="paper", sinkhorn_iters=200) == 200
    assert iterations(epsilon=0.03) > iterations(epsilon=0.1) == iterations(epsilon=0.5) == 10
    assert iterations(sinkhorn_iters=3) == 3


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"])
def test_shipped_configs_have_the_published_sizes(name):
    from conftest import ROOT

    read = size(ROOT / "scripts" / "configs" / f"{name}.json")
    published = {"llama-3.2-1b": 1.236e9, "llama-3.1-8b": 8.030e9, "llama-3.1-70b": 70.554e9}[name]
    assert read.parameters == pytest.approx(published, rel=1e-3)


def test_a_missing_config_is_an_error(fails, configs):
    (configs["source"] / "config.json").unlink()
    flags = ["--target-model", configs["target"], "--plan-only"]
    assert "config.json does not exist" in fails(stage1, *flags, "--source-model", configs["source"])
    assert "no model given" in fails(stage1, *flags)


def test_two_equal_models_are_two_models(configs):
    """When a fine-tuned model is fused into its base, both are read and both write rows."""
    target = size(configs["target"])
    other = dataclasses.replace(target, name="other")
    again, different = (cost.stage1_cost(target, source, Experiment(), timed=False) for source in (target, other))
    assert again == different
    assert again.disk > 2 * row_bytes(target.layout, again.rows, recorded_sides(ATTENTION))


def test_memory_of_the_plans_follows_the_budget():
    def memory(M, budget, device="cpu"):
        experiment = Experiment.of(pairs_budget_mb=budget, device=device)
        return cost.plans_memory(1024, 2048, 2000, M, experiment) / 2**20

    rows = 4 * 2000 * 2048 / 2**20  # of one source layer
    assert memory(20, 1) - memory(10, 1) < 5  # potentials alone
    assert memory(20, 8192) - memory(10, 8192) == pytest.approx(10 * rows, rel=0.1)
    assert memory(20, 8192) - memory(20, 1) == pytest.approx(20 * rows)
    for budget in (500, 1000):  # an accelerator fills what the rows leave of the budget with pairs
        assert budget < memory(1000, budget, "cuda") - 260 < budget + 300


def test_a_short_run_has_no_negative_time(sizes):
    short = cost.stage1_cost(*sizes, Experiment.of(sinkhorn_mode="paper", sinkhorn_iters=1))
    assert all(side.seconds > 0 for side in short.sides)


def test_a_dry_run_says_once_that_it_estimated_no_time(configs, models, texts, tmp_path, capsys):
    """With --plan-only every line has a time."""
    printed = {}
    for mode, pair in (("--dry-run", models), ("--plan-only", configs)):
        run_main(stage1, *pair_flags(pair), *data_flags(texts), "--out-dir", tmp_path / "p", mode)
        printed[mode] = capsys.readouterr().out
        assert "peak memory" in printed[mode]
    assert printed["--dry-run"].count("the time was not estimated; --plan-only does it") == 1
    assert not re.search(r"^(q|plans|reading) .*(s|min|h)$", printed["--dry-run"], re.M)
    assert len(re.findall(r"^(?:q|plans|reading) .* (?:s|min|h)$", printed["--plan-only"], re.M)) == 3
    assert "on this machine" in printed["--plan-only"] and "not estimated" not in printed["--plan-only"]
