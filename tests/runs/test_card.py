"""Model cards: what they say of models, data and settings, and the place for results."""

import json
import logging

import pytest
from conftest import run_main
from huggingface_hub import ModelCard
from stages import front_matter, fuse_by_id

from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.models.checkpoints import open_checkpoint
from core.runs.card import RESULTS_BEGIN, RESULTS_END, add_results, fused_card, results_section
from core.runs.lineage import describe_model


@pytest.fixture(scope="module")
def fused(models, plans, tmp_path_factory):
    """A fused checkpoint that was made of local folders."""
    out = tmp_path_factory.mktemp("fused") / "out"
    run_main(stage2, "--hot_dir", plans["token"], "--feature-map", "regression", "--output_dir", out)
    return out


def test_cards_name_models_licence_and_the_whole_experiment(plans, hub_root, licensed, tmp_path, caplog):
    licensed("license: apache-2.0", "license: apache-2.0")
    origin = hub_root / "someone/small/provenance.json"
    origin.write_text('{"origin": "hub revision v1.5"}')
    with caplog.at_level(logging.WARNING):
        fused = fuse_by_id(plans, tmp_path / "fused", "--ridge", "0.02")
    origin.unlink()
    assert not [r for r in caplog.records if "licence" in r.getMessage()]
    shared = {
        "license": "apache-2.0",
        "tags": ["transport-and-merge"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    both = ["someone/small", "someone/big"]
    assert front_matter(fused) == {**shared, "base_model": both, "base_model_relation": "merge"}
    card = (fused / "README.md").read_text()
    report = json.loads((fused / "fusion_report.json").read_text())
    assert f"| {report['mean']['q']['explained_variance']:.3g} |" in card and "| hub revision v1.5 |" in card
    assert "| plans | pooling | token |" in card and "| fusion | ridge | 0.02 |" in card
    # Of a local path only the name is given: its folders are nobody else's business.
    assert "of `texts.jsonl`" in card and "/texts.jsonl" not in card

    for scenario, bases in (("hot", both), ("no_hot", both[:1])):
        out = tmp_path / scenario
        run_main(stage3, "--model_dir", fused, "--output_dir", out, "--sft-samples", 3, "--training_scenario", scenario)
        relation = "merge" if len(bases) > 1 else "finetune"
        assert front_matter(out) == {**shared, "base_model": bases, "base_model_relation": relation}
        card = (out / "README.md").read_text()
        losses = json.loads((out / "manifest.json").read_text())["losses"]
        assert "rows: 3 texts of `texts.jsonl`" in card and f"{losses[-1]:.4f} at the last" in card
        assert "| training | learning_rate | 1e-06 |" in card
        assert ("| fusion | ridge | 0.02 |" in card) == (scenario == "hot")


def test_local_folders_are_named_but_are_no_base_models(fused, models, monkeypatch):
    """The hub refuses a card whose base model is no id of the hub."""
    found = front_matter(fused)
    assert "base_model" not in found and found["license"] == "unknown" and found["base_model_relation"] == "merge"
    card = (fused / "README.md").read_text()
    assert "`target` and `source` are local folders" in card and str(models["target"]) not in card
    monkeypatch.chdir(models["target"].parents[1])
    described = describe_model(open_checkpoint(f"{models['target'].parent.name}/target"))  # looks like a hub id
    assert (described["hub_id"], described["name"]) == (None, "target")


@pytest.mark.parametrize(
    ("projections", "words"),
    [("qkvo", "The attention weights"), (["v", "gate"], "The attention and MLP weights"), (["up"], "The MLP weights")],
)
def test_a_card_says_which_weights_were_fused(fused, projections, words):
    lineage = json.loads((fused / "manifest.json").read_text())["lineage"]
    figures = {"norm_ratio": 1.0, "cosine": 0.0, "explained_variance": None}
    assert f"{words} of `target`" in fused_card(lineage, dict.fromkeys(projections, figures), 0)


def test_results_name_the_controls_that_were_scored():
    data = {"rows": 3, "file": None, "subset": "gsm8k", "split_seed": 0, "sha256": "0" * 64}
    section = results_section("fused", data, "arm  nll\nbase  3\npermuted  2\nfiltered_self  2\nfused  1\n\na note")
    assert "The controls (`permuted`, `filtered_self`) share" in section


def test_data_sets_of_the_hub_are_listed(fused):
    lineage = json.loads((fused / "manifest.json").read_text())["lineage"]
    means = json.loads((fused / "fusion_report.json").read_text())["mean"]
    for file, expected in ((None, ["openai/gsm8k"]), ("/mine/gsm8k.jsonl", None)):
        changed = {**lineage, "data": lineage["data"] | {"subset": "gsm8k", "file": file}}
        assert ModelCard(fused_card(changed, means, 0)).data.datasets == expected


def test_a_card_is_no_part_of_a_model_or_a_fingerprint(plans, licensed, tmp_path, caplog):
    licensed(None, None)
    before, out = open_checkpoint("someone/small").identity, fuse_by_id(plans, tmp_path / "f")
    identity = open_checkpoint(str(out)).identity
    licensed("license: mit", "license: mit")
    (out / "README.md").write_text("another")
    assert open_checkpoint("someone/small").identity == before
    assert open_checkpoint(str(out)).identity == identity
    with caplog.at_level(logging.INFO):
        fuse_by_id(plans, out)
    assert any("is finished already" in r.getMessage() for r in caplog.records)
    assert (out / "README.md").read_text() == "another"


def test_results_take_the_place_of_earlier_ones_and_of_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    add_results(tmp_path, "new\n")
    assert not path.exists()
    for foreign in (b"mine", b"mine " + RESULTS_BEGIN + b"cut"):
        path.write_bytes(foreign)
        add_results(tmp_path, "new\n")
        assert path.read_bytes() == foreign
    head, tail = b"\xff\r\n" + RESULTS_BEGIN, RESULTS_END + b"\r\n\ttail"
    path.write_bytes(head + tail)
    for section in ("one\n", "one\n", "two\n"):
        add_results(tmp_path, section)
        assert path.read_bytes() == head + section.encode() + tail
