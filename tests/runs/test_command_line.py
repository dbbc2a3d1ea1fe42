"""Command lines of the stages: which flags there are, what overrides what, what is refused, where the log goes."""

from pathlib import Path

import pytest
from conftest import ROOT

from core.errors import UserError
from core.runs.command_line import Parser, parse_command
from core.runs.settings import all_settings
from evaluation.runner import runner_flags

DEMO = ROOT / "scripts/experiments/demo.yaml"


def parse(*argv: str, stage: str = "1", aliases: dict[str, str] | None = None):
    return parse_command([str(a) for a in argv], stage, "", {"out_dir": "out"}, aliases)


def test_flags_override_the_file_and_dashes_are_underscores():
    for spelling in ("--max-rows", "--max_rows"):
        assert parse("--config", DEMO, spelling, "70").experiment.reading.max_rows == 70
    assert parse("--config", DEMO, "--max_rows=90").experiment.reading.max_rows == 90
    assert parse("--out_dir", "x").path("out_dir", "plans") == Path("x")
    assert parse("--config", DEMO).path("out_dir", "plans") == Path("runs/demo/plans")


@pytest.mark.parametrize("flags", [("--target-model", ""), ("--data_file=",), ("--modelA-id=",)])
def test_an_empty_value_is_refused(flags):
    aliases = {"modelA_id": "target_model"}
    with pytest.raises(UserError, match=f"argument {flags[0].rstrip('=').replace('_', '-')}: it is empty"):
        parse("--alpha", "0.1", *flags, "--seed", "0", aliases=aliases)


def test_letters_mean_what_the_authors_readme_says():
    letters = {"model_a_path": "source_model", "model_b_path": "target_model"}
    one = parse("--model-a-path", "big", "--model-b-path", "small", aliases=letters).experiment
    letters = {"modelA_id": "target_model", "modelB_id": "source_model"}
    two = parse("--modelA_id", "small", "--modelB_id", "big", stage="2", aliases=letters).experiment
    for found in (one, two):
        assert (found.models.source_model, found.models.target_model) == ("big", "small")


def test_the_rows_that_are_read_have_an_older_name(tmp_path):
    assert parse("--max-samples", 7).experiment.data.max_rows_read == 7
    (tmp_path / "x.yaml").write_text("max_samples: 8")
    assert parse("--config", tmp_path / "x.yaml").experiment.data.max_rows_read == 8


def test_help_has_the_groups_of_the_settings(capsys):
    with pytest.raises(SystemExit):
        parse("--help", stage="3")
    shown = capsys.readouterr().out
    assert "\nTexts:\n  which rows are read, and how they are divided\n\n  --split-seed INT" in shown
    assert "\nTransport plans:" not in shown  # which stage 3 does not make


def test_a_command_without_stages_takes_the_defaults_of_its_flags_from_an_experiment(tmp_path):
    (tmp_path / "x.yaml").write_text("device: cuda:1\nlimit: 5\nalpha: 0.2")
    parser = Parser("")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--benchmark-data", default="items")
    given, experiment = parser.parse_with_config(["--config", f"{tmp_path}/x.yaml", "--limit", "7"])
    assert (given["device"], given["limit"], given["benchmark_data"]) == ("cuda:1", 7, "items")
    assert experiment.fusion.alpha == 0.2
    assert parser.parse_with_config([])[1] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--alpha", "1.5"), "alpha is 1.5; expected a number from 0 to 1"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", "much"), "expected float or auto or learned"),
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
        shown = capsys.readouterr().out
        for name, setting in all_settings().items():
            if setting.kind is bool and stage in setting.stages:
                assert f"--no-{name.replace('_', '-')}" in shown, name
    parser = Parser("")
    parser.add_argument("--dry-run", action="store_true")
    assert [parser.parse(argv)["dry_run"] for argv in ([], ["--dry_run"], ["--dry-run", "--no_dry_run"])] == [
        False,
        True,
        False,
    ]
    given = runner_flags("", "x").parse(["--model", "m", "--trust-remote-code", "--no-trust_remote_code"])
    assert given["trust_remote_code"] is False


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
