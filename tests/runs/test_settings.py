"""YAML and flags: what is accepted, what overrides what, what is refused."""

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

from core.errors import UserError
from core.fusion.settings import FusionSettings
from core.runs.command_line import Parser, load_experiment, parse_command
from core.runs.settings import Experiment, all_settings
from evaluation.runner import runner_flags

DEMO = ROOT / "scripts/experiments/demo.yaml"


def parse(*argv: str, stage: str = "1", aliases: dict[str, str] | None = None):
    return parse_command([str(a) for a in argv], stage, "", {"out_dir": "out"}, aliases)


def test_demo_is_the_setting_that_was_measured():
    demo = parse("--config", DEMO, stage="2").experiment
    assert (demo.reading.pooling, demo.reading.max_rows, demo.fusion.feature_map, demo.fusion.residual_form) == (
        "token",
        4096,
        "regression",
        "interpolate",
    )
    assert (demo.fusion.alpha, demo.fusion.top_k, demo.reading.max_tokens, demo.training.block_size) == (
        0.07,
        0,
        110,
        110,
    )
    assert (demo.reading.calibration_samples, demo.training.sft_samples, demo.evaluation.held_out_samples) == (
        160,
        96,
        64,
    )
    assert (
        demo.training.train_batch_size,
        demo.training.gradient_accumulation,
        demo.training.learning_rate,
        demo.training.epochs,
    ) == (1, 4, 2e-5, 1.0)
    assert demo.run_dir == Path("runs/demo")


def test_quick_is_the_same_on_less_data():
    full, quick = (parse("--config", DEMO, *extra).experiment for extra in ((), ("--quick",)))
    assert quick.name == "demo-quick" and quick.reading.calibration_samples < full.reading.calibration_samples
    assert (quick.fusion.feature_map, quick.fusion.alpha, quick.compute.seed) == (
        full.fusion.feature_map,
        full.fusion.alpha,
        full.compute.seed,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/experiments").glob("*.yaml")), ids=lambda p: p.name)
def test_every_experiment_file_loads(path):
    parse("--config", path).experiment.check()


def test_flags_override_the_file_and_dashes_are_underscores():
    for spelling in ("--max-rows", "--max_rows"):
        assert parse("--config", DEMO, spelling, "70").experiment.reading.max_rows == 70
    assert parse("--config", DEMO, "--max_rows=90").experiment.reading.max_rows == 90
    assert parse("--out_dir", "x").path("out_dir", "plans") == Path("x")
    assert parse("--config", DEMO).path("out_dir", "plans") == Path("runs/demo/plans")


def test_seed_letters_mean_what_the_seed_says():
    one = parse(
        "--model-a-path",
        "big",
        "--model-b-path",
        "small",
        aliases={"model_a_path": "source_model", "model_b_path": "target_model"},
    ).experiment
    assert (one.models.source_model, one.models.target_model) == ("big", "small")
    two = parse(
        "--modelA_id",
        "small",
        "--modelB_id",
        "big",
        stage="2",
        aliases={"modelA_id": "target_model", "modelB_id": "source_model"},
    ).experiment
    assert (two.models.source_model, two.models.target_model) == ("big", "small")


def test_gsm8k_has_its_own_epsilon():
    assert parse("--data-subset", "gsm8k").experiment.epsilon == 0.03
    assert parse("--data-subset", "file").experiment.epsilon == 0.1
    assert parse("--data-subset", "gsm8k", "--epsilon", "0.2").experiment.epsilon == 0.2


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


# What is part of a fingerprint

# Stage -> its settings with which the bytes of its output change.
CHANGES = {
    "1": "device dtype seed max_tokens pooling max_rows tokens_per_batch device_map epsilon eta sinkhorn_iters "
    "sinkhorn_tol sinkhorn_mode layer_cost_scale",
    "2": "device feature_map residual_form alpha top_k p_topk q_topk ridge max_shard_size",
    "3": "device dtype seed tokens_per_batch max_shard_size training_scenario freeze_strategy train_alpha block_size "
    "packing epochs train_batch_size gradient_accumulation gradient_checkpointing learning_rate lr_scheduler "
    "warmup weight_decay max_grad_norm save_steps validation_samples eval_steps early_stop alpha_search lr_search "
    "use_lora lora_rank lora_alpha lora_dropout lora_targets distill_weight distill_temperature",
    "e": "device dtype seed max_tokens tokens_per_batch",
}
# Those that only name an input: the contents of the model, or of the rows, are recorded in their place.
INPUTS = {
    "1": "target_model target_revision source_model source_revision data_subset data_file max_rows_read group_column "
    "split_seed calibration_samples",
    "2": "target_model target_revision source_model source_revision",
    "3": "source_model source_revision data_subset data_file max_rows_read group_column split_seed sft_samples",
    "e": "target_model target_revision source_model source_revision data_subset data_file max_rows_read group_column "
    "split_seed held_out_samples general_file",
}
# Those that say where, how fast, or what else: no byte of the output depends on them.
BESIDE = {
    "1": "trust_remote_code activations_budget_mb pairs_budget_mb",
    "2": "push_to_hub",
    "3": "trust_remote_code push_to_hub model_type report_to save_untrained_folded",
    "e": "trust_remote_code",
}
OTHERS = {str: "another", int: 7, float: 0.77, bool: True, tuple: (0.5,)}


LORA, DISTILL, TOKEN = {"use_lora": True}, {"training_scenario": "distill"}, {"pooling": "token"}
# Setting -> the others with which it changes something, where these are not the defaults.
NEEDS: dict[str, dict] = {
    **dict.fromkeys(("seed", "max_rows"), TOKEN),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), LORA),
    **dict.fromkeys(("distill_weight", "distill_temperature"), DISTILL),
    "save_steps": {"early_stop": 3},
}


@pytest.mark.parametrize("stage", CHANGES)
def test_every_setting_of_a_stage_is_decided_and_a_changed_one_changes_the_fingerprint(stage):
    """A new setting fails here until somebody has decided what it changes."""
    names = [name for name, setting in all_settings().items() if stage in setting.stages]
    decided = [*CHANGES[stage].split(), *INPUTS[stage].split(), *BESIDE[stage].split()]
    assert sorted(decided) == sorted(names)
    for name in names:
        before = Experiment.of(**NEEDS.get(name, {}))
        changed = before.changed(**{name: OTHERS[all_settings()[name].kind]}).deciding(stage)
        assert (changed != before.deciding(stage)) == (name in CHANGES[stage].split()), name


@pytest.mark.parametrize(
    ("stage", "others", "names"),
    [
        ("1", {"pooling": "text"}, "seed max_rows"),
        ("3", {"training_scenario": "no_hot"}, "freeze_strategy train_alpha alpha_search distill_weight"),
        ("3", {"training_scenario": "distill"}, "freeze_strategy train_alpha alpha_search"),
        ("3", {"training_scenario": "hot"}, "distill_weight distill_temperature"),
        ("3", {"use_lora": False}, "lora_rank lora_alpha lora_dropout lora_targets"),
        ("3", {"lr_search": (0.1,)}, "learning_rate"),
        ("3", {"early_stop": None}, "save_steps"),
        ("3", {"early_stop": 3}, "eval_steps"),
    ],
)
def test_a_setting_that_changes_nothing_beside_the_others_is_in_no_fingerprint(stage, others, names):
    """A finished folder would be emptied for it."""
    before = Experiment.of(**others)
    for name in names.split():
        changed = before.changed(**{name: OTHERS[all_settings()[name].kind]})
        assert changed.deciding(stage) == before.deciding(stage) and changed.deciding(stage)[name] is None, name


def test_a_seed_counts_in_training_and_evaluation_whatever_the_pooling():
    for stage in "3e":
        assert Experiment.of(seed=1).deciding(stage) != Experiment.of(seed=2).deciding(stage)


def test_of_a_device_its_kind_counts():
    first, second = Experiment.of(device="cuda:0"), Experiment.of(device="cuda:1")
    assert first.deciding("1") == second.deciding("1") != Experiment.of(device="cpu").deciding("1")


def test_what_fusion_reads_is_part_of_the_fingerprint_of_stage_2():
    assert {f.name for f in dataclasses.fields(FusionSettings)} < Experiment().deciding("2").keys()


# Switches


@pytest.mark.parametrize("spelling", ["--no-packing", "--no_packing"])
def test_what_a_file_switches_on_a_flag_switches_off(tmp_path, spelling):
    path = tmp_path / "x.yaml"
    path.write_text("packing: true\nuse_lora: true")
    assert parse("--config", path, stage="3").experiment.training.packing
    found = parse("--config", path, spelling, stage="3").experiment
    assert (found.training.packing, found.adapters.use_lora) == (False, True)
    assert not parse("--config", path, "--packing", spelling, stage="3").experiment.training.packing


def test_every_switch_of_every_command_has_its_other_form(capsys):
    for stage in "123e":
        with pytest.raises(SystemExit):
            parse("--help", stage=stage)
        told = capsys.readouterr().out
        for name, setting in all_settings().items():
            if setting.kind is bool and stage in setting.stages:
                assert f"--no-{name.replace('_', '-')}" in told, name
    parser = Parser("")
    parser.add_argument("--dry-run", action="store_true")
    assert [parser.parse(argv)["dry_run"] for argv in ([], ["--dry_run"], ["--dry-run", "--no_dry_run"])] == [
        False,
        True,
        False,
    ]
    given = runner_flags("", "x").parse(["--model", "m", "--trust-remote-code", "--no-trust_remote_code"])
    assert given["trust_remote_code"] is False


# Where the log goes


def test_the_log_is_beside_the_results(monkeypatch, tmp_path):
    def log(*argv):
        return parse("--config", DEMO, *argv).log_file("out_dir", "plans")

    assert log() == Path("runs/demo/log.txt")
    assert log("--out-dir", tmp_path / "demo-regression/plans") == tmp_path / "demo-regression/log.txt"
    assert log("--out-dir", tmp_path / "elsewhere") == log("--out-dir", "plans") == Path("runs/demo/log.txt")
    monkeypatch.setenv("TRANSPORT_RESULTS_ROOT", str(tmp_path))
    assert log() == log("--out-dir", "elsewhere") == tmp_path / "demo/log.txt"
    assert parse("--config", DEMO).path("out_dir", "plans") == tmp_path / "demo/plans"
    assert parse("--out-dir", tmp_path).log_file("out_dir", "plans") is None
    trained = parse("--config", DEMO, "--out-dir", tmp_path / "x/adapted/hot/seed0", stage="3")
    assert trained.log_file("out_dir", "adapted/hot/seed0") == tmp_path / "x/log.txt"
    compared = parse("--config", DEMO, "--out-dir", tmp_path / "x", stage="e")
    assert compared.log_file("out_dir", ".") == tmp_path / "x/log.txt"
