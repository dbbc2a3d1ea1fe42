"""YAML and flags: what is accepted, what overrides what, what is refused."""

from pathlib import Path

import pytest
from conftest import ROOT

from core.command import load_experiment, parse_command
from core.runs import UserError

DEMO = ROOT / "scripts/experiments/demo.yaml"


def parse(*argv: str, stage: str = "1", aliases: dict[str, str] | None = None):
    return parse_command([str(a) for a in argv], stage, "", {"out_dir": "out"}, aliases)


def test_demo_is_the_setting_that_was_measured():
    demo = parse("--config", DEMO, stage="2").experiment
    assert (demo.pooling, demo.max_rows, demo.feature_map, demo.residual_form) == (
        "token",
        4096,
        "regression",
        "interpolate",
    )
    assert (demo.alpha, demo.top_k, demo.max_tokens, demo.block_size) == (0.07, 0, 110, 110)
    assert (demo.calibration_samples, demo.sft_samples, demo.held_out_samples) == (160, 96, 64)
    assert (demo.train_batch_size, demo.gradient_accumulation, demo.learning_rate, demo.epochs) == (1, 4, 2e-5, 1.0)
    assert demo.run_dir == Path("runs/demo")


def test_quick_is_the_same_on_less_data():
    full, quick = (parse("--config", DEMO, *extra).experiment for extra in ((), ("--quick",)))
    assert quick.name == "demo-quick" and quick.calibration_samples < full.calibration_samples
    assert (quick.feature_map, quick.alpha, quick.seed) == (full.feature_map, full.alpha, full.seed)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/experiments").glob("*.yaml")), ids=lambda p: p.name)
def test_every_experiment_file_loads(path):
    parse("--config", path).experiment.check()


def test_flags_override_the_file_and_dashes_are_underscores():
    for spelling in ("--max-rows", "--max_rows"):
        assert parse("--config", DEMO, spelling, "70").experiment.max_rows == 70
    assert parse("--config", DEMO, "--max_rows=90").experiment.max_rows == 90
    assert parse("--out_dir", "x").path("out_dir", "plans") == Path("x")
    assert parse("--config", DEMO).path("out_dir", "plans") == Path("runs/demo/plans")


def test_seed_letters_mean_what_the_seed_says():
    one = parse("--model-a-path", "big", "--model-b-path", "small",
                aliases={"model_a_path": "source_model", "model_b_path": "target_model"}).experiment  # fmt: skip
    assert (one.source_model, one.target_model) == ("big", "small")
    two = parse("--modelA_id", "small", "--modelB_id", "big", stage="2",
                aliases={"modelA_id": "target_model", "modelB_id": "source_model"}).experiment  # fmt: skip
    assert (two.source_model, two.target_model) == ("big", "small")


def test_gsm8k_has_its_own_epsilon():
    assert parse("--data-subset", "gsm8k").experiment.regularisation == 0.03
    assert parse("--data-subset", "file").experiment.regularisation == 0.1
    assert parse("--data-subset", "gsm8k", "--epsilon", "0.2").experiment.regularisation == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alfa: 0.1", "unknown key 'alfa'; known keys: name, target_model"),
        ("quick: {rows: 3}", "unknown key 'rows'"),
        ("top_k: many", "top_k is 'many'; expected int"),
        ("top_k: 1.5", "top_k is 1.5; expected int"),
        ("trust_remote_code: 1", "expected bool"),
        ("quick: true", "`quick:` must hold"),
        ("max_rows: .inf", "max_rows is inf; expected int"),
        ("- a", "must hold `key: value`"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_experiment(path)


def test_yaml_numbers_without_a_point_are_floats(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("learning_rate: 2e-5\nepochs: 3\np_topk:\n")
    assert load_experiment(path) == {"learning_rate": 2e-5, "epochs": 3.0, "p_topk": None, "name": "x"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--alpha", "1.5"), "alpha is 1.5; expected a number from 0 to 1"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", "much"), "invalid float value"),
        (("--top-k", "-1"), "top_k is -1"),
        (("--p-topk", "0"), "p_topk is 0; expected at least 1"),
        (("--ridge", "0"), "ridge is 0.0; expected a positive"),
        (("--feature-map", "linear"), "invalid choice: 'linear'"),
        (("--epsilon", "0.1"), "unrecognized arguments: --epsilon"),  # a flag of stage 1
        (("--feature-map", "regression", "--q-topk", "3"), "leave it out"),
        (("--quick",), "--quick needs --config"),
        (("--device", "cuda:7"), "device 'cuda:7' is not available"),
        (("--device", "toaster"), "device 'toaster' is not available"),
        (("--config", "none.yaml"), "none.yaml does not exist"),
    ],
)
def test_bad_flags_are_refused(argv, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        parse(*argv, stage="2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tokens-per-batch", "0"), "tokens_per_batch is 0; expected at least 1"),
        (("--activations-budget-mb", "-1"), "activations_budget_mb is -1; expected 0"),
        (("--device-map", "everywhere"), "invalid choice: 'everywhere'"),
        (("--batch-size", "8"), "unrecognized arguments: --batch-size"),
    ],
)
def test_bad_flags_of_reading_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def test_missing_folder_flag_is_named():
    with pytest.raises(UserError, match="--out_dir is missing"):
        parse().path("out_dir", "plans")
