"""Bad input to the stages: one line, exit code 2, nothing left behind."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama, make_tokenizer, run_main, save, sentences
from safetensors.torch import load_file
from stages import digests, train
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.errors import UserError
from core.runs.plan_files import write_activations


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--target-model": "/no/such/model"}, "model /no/such/model does not exist"),
        ({"--target-model": "nobody/nothing"}, "neither a folder, nor in models, nor to be had from the hub"),
        ({"--target-model": "EMPTY"}, "not a model folder: it has no config.json"),
        ({"--source-model": "BERT"}, "unsupported model_type 'bert'; supported: llama (LlamaForCausalLM), mistral"),
        ({"--source-model": "CONFIG"}, "has no model.safetensors"),
        ({"--data-file": "FEW"}, "plans need at least 16 texts"),
        ({"--data-file": "BLANK"}, "row 21 has an empty text"),
        ({"--calibration-samples": "15"}, "plans need at least 16 texts"),
        ({"--epsilon": "-1"}, "epsilon is -1.0; expected a positive number"),
        ({"--config": "YAML"}, "unknown key 'learning'"),
        ({"--out-dir": "OTHERS"}, "is not empty and was not made by this tool"),
        ({"--nonsense": "1"}, "unrecognized arguments: --nonsense"),
    ],
)
def test_stage1_bad_input(fails, models, texts, tmp_path, flags, message):
    for name in ("empty", "bert", "config", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    shutil.copy(models["source"] / "config.json", tmp_path / "config")
    (tmp_path / "others/thesis.txt").write_text("mine")
    few = sentences(20, 0)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in few))
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*few, " "]))
    (tmp_path / "bad.yaml").write_text("learning: fast")
    places = {
        "EMPTY": "empty",
        "BERT": "bert",
        "CONFIG": "config",
        "OTHERS": "others",
        "FEW": "few.jsonl",
        "BLANK": "blank.jsonl",
        "YAML": "bad.yaml",
    }
    given = {
        "--target-model": models["target"],
        "--source-model": models["source"],
        "--data-subset": "file",
        "--data-file": texts,
        "--out-dir": tmp_path / "out",
    }
    given |= {flag: tmp_path / places[value] if value in places else value for flag, value in flags.items()}
    assert message in fails(stage1, *(part for pair in given.items() for part in pair))
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "others").iterdir())) == 1


def test_stage2_bad_input(fails, models, plans, tmp_path):
    def failure(*flags, target="target", source="source", hot_dir=plans["token"]):
        given = [
            "--hot_dir",
            hot_dir,
            "--modelA_id",
            models[target],
            "--modelB_id",
            models[source],
            "--output_dir",
            tmp_path / "out",
            *flags,
        ]
        line = fails(stage2, *given)
        assert not (tmp_path / "out").exists()
        return line

    assert "target and source are swapped" in failure(target="source", source="target")
    assert "the plans belong to other models" in failure(target="other")
    assert "alpha is 2.0; expected a number from 0 to 1" in failure("--alpha", "2")
    assert "run that stage first" in failure(hot_dir=tmp_path)
    half = tmp_path / "half"
    shutil.copytree(plans["token"], half)
    manifest = json.loads((half / "manifest.json").read_text()) | {"status": "incomplete"}
    (half / "manifest.json").write_text(json.dumps(manifest))
    assert "is not finished" in failure(hot_dir=half)
    (half / "manifest.json").write_text("{")
    assert "is not valid JSON" in failure(hot_dir=half)


def test_stage3_bad_input(fails, fused, models, plans, tmp_path):
    out = tmp_path / "out"
    assert "--model_type qwen2, but" in fails(
        stage3, "--model_dir", fused, "--output_dir", out, "--model_type", "qwen2"
    )
    assert "hot_residual.safetensors" in fails(stage3, "--model_dir", models["target"], "--output_dir", out)
    assert "invalid choice: 'mamba'" in fails(
        stage3, "--model_dir", fused, "--output_dir", out, "--model_type", "mamba"
    )
    assert "--output_dir is missing" in fails(stage3, "--model_dir", fused)
    assert "holds the output of stage 'plans'" in fails(stage3, "--model_dir", fused, "--output_dir", plans["text"])
    assert "leaves nothing to train" in fails(
        stage3, "--model_dir", fused, "--output_dir", out, "--alpha", 0, "--freeze-strategy", "frozen_base"
    )
    assert not out.exists()


def test_an_output_folder_is_never_an_input(fails, fused, models, plans, tmp_path):
    """Writing there would empty it first."""
    trained = train(fused, tmp_path / "a")
    before = digests(trained)
    assert "holds the input" in fails(stage3, "--model_dir", trained, "--output_dir", trained)
    again = ["--target-model", trained, "--source-model", models["source"], "--data-subset", "python_reference"]
    assert "holds the input" in fails(stage1, *again, "--out-dir", trained)
    assert "holds the input" in fails(
        stage2,
        "--hot_dir",
        plans["token"],
        "--modelA_id",
        models["target"],
        "--modelB_id",
        models["source"],
        "--output_dir",
        plans["token"],
    )
    assert digests(trained) == before


def test_another_split_of_the_same_data_is_refused(fails, fused, texts, tmp_path):
    line = fails(
        stage3,
        "--model_dir",
        fused,
        "--output_dir",
        tmp_path / "a",
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--split-seed",
        1,
    )
    assert "split_seed is 1, but the plans were made with 0" in line


def test_constant_neurons_have_no_deviation(tmp_path):
    rows = torch.full((4096, 3), 0.1)
    rows[:, 1] = torch.randn(4096)
    write_activations(tmp_path, "target", {("q", 0): rows.clone()}, torch.zeros(4096, dtype=torch.bool), half=True)
    stored = load_file(tmp_path / "activations/target.safetensors")
    assert stored["q.0.std"][0] == stored["q.0.std"][2] == 0 and stored["q.0"].dtype == torch.float16
    assert_close(stored["q.0"].float() + stored["q.0.mean"], rows, atol=2e-3, rtol=0)


def test_nan_activations_are_named(models, texts, tmp_path):
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    folder = save(broken, make_tokenizer(400, 1), tmp_path / "broken")
    with pytest.raises(UserError, match="target layer 1, side k: activations contain NaN"):
        run_main(
            stage1,
            "--target-model",
            folder,
            "--source-model",
            models["source"],
            "--data-subset",
            "file",
            "--data-file",
            texts,
            "--out-dir",
            tmp_path / "p",
        )


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["run_activs_and_hot.py"], ROOT),
        (["core/generate_hot_residual.py"], ROOT),
        (["-m", "core.generate_hot_residual"], ROOT),
        (["generate_hot_residual.py"], ROOT / "core"),
        (["train_hot_residual_sft.py"], ROOT / "core"),
        (["evaluation/compare_arms.py"], ROOT),
    ],
)
def test_every_way_to_start_a_command(command, folder):
    done = subprocess.run(
        [sys.executable, *command, "--alpha", "x" if "generate" in command[-1] else "0.1", "--nope"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
