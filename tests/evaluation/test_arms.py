"""What a comparison is made of, without a run of the stages: losses, the texts that are scored, arms and trainings."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from core.data import Row
from core.errors import UserError
from core.fusion.controls import CONTROLS
from core.manifest import Manifest
from core.models.checkpoints import open_checkpoint
from core.runs.settings import Experiment
from core.training.heldout import text_nll
from evaluation.arms.models import Arms
from evaluation.arms.run import Run
from evaluation.arms.texts import text_set


def test_text_nll_is_the_models_own_loss_whatever_the_batch(models):
    model = open_checkpoint(str(models["source"])).load_model("float32")
    examples = [
        {"input_ids": list(range(n)), "labels": [-100] * skip + list(range(skip, n))}
        for n, skip in ((9, 0), (4, 2), (15, 7), (2, 0))
    ]
    expected = []
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            expected.append(float(model(ids, labels=labels).loss) * counted)
    for tokens_per_batch in (1, 30, 60):
        assert text_nll(model, examples, tokens_per_batch, "test") == pytest.approx(expected, abs=1e-3)


def test_texts_without_a_token_to_score_are_left_out_and_counted(models):
    tokenizer, other = (open_checkpoint(str(models[name])).load_tokenizer() for name in ("target", "source"))
    rows = [Row(((None, "model layer neuron"),), "a"), Row(((None, "x"),), "b"), Row(((None, "plan weight"),), "a")]
    texts = text_set("held_out", rows, (tokenizer, other), 100)
    tokens = [len(tokenizer(row.plain)["input_ids"]) - 1 for row in rows]
    assert tokens[1] == 0 and texts.tokens == [tokens[0], tokens[2]]
    assert texts.counts() == {"texts": 2, "tokens": sum(tokens), "groups": 1, "left_out": 1, "end_of_turn": False}
    answers = [Row((("user", "plan"), ("assistant", "weight")), "a")]
    assert text_set("held_out", answers, (tokenizer, other), 100).end_of_turn
    cut = [Row((("user", "plan"), ("assistant", "weight " * 50)), "a")]
    assert not text_set("held_out", cut, (tokenizer, other), 12).end_of_turn  # the end of the answer was cut off


@pytest.mark.parametrize(
    ("arm", "changed", "refused"),
    [
        ("hot/seed0", {}, False),
        ("no_hot/seed0", {"freeze_strategy": None}, False),  # it has no residual to freeze
        ("hot/seed1", {"freeze_strategy": "none"}, True),
        ("no_hot/seed0", {"epochs": 3.0}, True),
    ],
)
def test_trainings_differ_in_what_their_scenario_has_alone(tmp_path, arm, changed, refused):
    def training(folder):
        settings = {"training_scenario": folder.split("/")[0], "freeze_strategy": "frozen_hot", "epochs": 1.0}
        settings |= {"seed": folder[-1]} | (changed if folder == arm else {})
        inputs = {"made_by": "f", "data": 1, "validation": 2, "settings": settings}
        return Manifest(tmp_path / folder, {"inputs": inputs})

    folders = {"fused_adapted": ("hot/seed0", "hot/seed1"), "no_hot": ("no_hot/seed0",)}
    trainings = {name: [training(folder) for folder in seeds] for name, seeds in folders.items()}
    fused = Manifest(tmp_path, {"fingerprint": "f", "inputs": {"plans": "p"}})
    plans = SimpleNamespace(manifest=Manifest(tmp_path, {"fingerprint": "p"}))
    with pytest.raises(UserError, match="had other settings") if refused else nullcontext():
        Run(tmp_path, plans, fused, trainings).check_chain()


@pytest.mark.parametrize(
    ("layers", "feature_map", "controls", "absent"),
    [
        (1, "regression", "usual", ["wrong_layer", "random_source"]),
        (2, "regression", "all", []),
        (2, "regression", "few", ["damped", "damped_mean", "wrong_layer", "random_source"]),
        (2, "coupling", "all", ["filtered_self", "random_source"]),
    ],
)
def test_a_control_that_a_run_cannot_have_is_no_arm(tmp_path, layers, feature_map, controls, absent):
    fused = Manifest(tmp_path / "fused", {"inputs": {"settings": {"feature_map": feature_map}}})
    run = Run(tmp_path, SimpleNamespace(shape=(layers, 4)), fused, {})
    arms = Arms(run, None, SimpleNamespace(identity={"weights": "w"}), Experiment.of(controls=controls))
    assert sorted(arms.absent) == sorted(absent)
    if controls != "all":  # the usual controls lack it as well
        assert arms.absent["random_source"] == "it takes minutes, with --controls all"
    kept = [control for control in CONTROLS if control not in absent]
    assert list(arms.made_from) == ["base", *kept, "fused", "source"]
