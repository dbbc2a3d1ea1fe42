"""What the main script was asked for: what wins over what, how runs are named, what is refused before anything runs."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import run_main

from core.errors import UserError
from core.runs import recipe_flags, resolve
from core.runs.command_line import EXPERIMENTS, load_experiment, parse_command, save_resolved
from core.runs.settings import Experiment, all_settings

OWN_SOURCE = "Llama-3.1-8B-Instruct"
NAMES = ("name", "task", "plans_from", "base_from")


@pytest.fixture
def resolved(monkeypatch, tmp_path):
    """Resolve flags and variables: (name of the run -> its settings, variable of the script -> its words)."""

    def run(*flags, **variables):
        for name in (*recipe_flags.VARIABLES, "VARIANT"):
            monkeypatch.delenv(name.upper(), raising=False)
        (tmp_path / "rows").mkdir(exist_ok=True)
        for name, value in {"TRANSPORT_RESULTS_ROOT": "results", **variables}.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "work").mkdir(exist_ok=True)
        run_main(resolve, "--started-in", tmp_path, "--work-dir", tmp_path / "work", *flags)
        lines = (tmp_path / "work/settings.sh").read_text().splitlines()
        script = {name: shlex.split(value.strip("()")) for name, value in (line.split("=", 1) for line in lines)}
        configs = map(Path, script["CONFIGS"])
        return {config.parent.name: yaml.safe_load(config.read_text("utf-8")) for config in configs}, script

    return run


def write_plans(folder, target, source=f"unsloth/{OWN_SOURCE}"):
    """The manifest of plans of a target (name, revision) and a source."""
    folder.mkdir(parents=True)
    pair = {"target": dict(zip(("id", "revision"), target, strict=True)), "source": {"id": source, "revision": None}}
    (folder / "manifest.json").write_text(json.dumps({"inputs": pair}))
    return folder / "manifest.json"


def test_without_flags_it_is_the_six_tasks_as_their_files_say(resolved, tmp_path):
    runs, script = resolved()
    assert tuple(runs) == resolve.TASKS
    for name, run in runs.items():
        file = load_experiment(EXPERIMENTS / f"{name}.yaml")
        assert run == {**file, **dict.fromkeys(NAMES, name), "benchmarks": list(file["benchmarks"])}
        config = tmp_path / f"results/{name}/experiment.yaml"
        assert parse_command(["--config", str(config)], "1", "", {}).experiment.name == name
    wanted = {"STEPS": "plans fuse train eval tables", "SEEDS": "", "LAUNCH": "python", "DRY_RUN": ""}
    assert {name: " ".join(script[name]) for name in wanted} == wanted
    root = EXPERIMENTS.parents[1]
    assert script["export MODELS_ROOT"] == [f"{root}/models"]
    assert script["export MALAY_REPO"] == [f"{root}/MalayMMLU"]


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(resolved):
    variables = {"TASKS": "thai", "MAX_SAMPLES": "50", "SFT_SAMPLES": "60"}
    (run,) = resolved("--max-samples", 99, **variables)[0].values()
    assert (run["calibration_samples"], run["sft_samples"], run["alpha"]) == (99, 60, 0.01)
    assert resolved("--tasks", "malay", **variables)[0].keys() == {"malay"}
    (run,) = resolved("--max-rows-read", 30, TASKS="thai")[0].values()
    assert (run["max_rows_read"], "calibration_samples" in run) == (30, False)


@pytest.mark.parametrize(
    ("variable", "value", "settings"),
    [
        ("TARGET_MODEL", "a/b", {"target_model": "a/b"}),
        ("SOURCE_MODEL", "a/b", {"source_model": "a/b"}),
        ("FEATURE_MAP", "calibrated", {"feature_map": "calibrated"}),
        ("ALPHA", "0.3", {"alpha": 0.3, "train_alpha": 0.3}),
        ("MAX_SAMPLES", "20", {"calibration_samples": 20}),
        ("SFT_SAMPLES", "20", {"sft_samples": 20}),
        ("HELD_OUT_SAMPLES", "20", {"held_out_samples": 20}),
        ("MAX_TOKENS", "20", {"max_tokens": 20}),
        ("LIMIT", "20", {"limit": 20}),
        ("PROMPT", "plain", {"prompt": "plain"}),
        ("BENCHMARK_DATA", "items", {"benchmark_data": "HERE/items"}),
        ("DATA_DIR", "rows", {"data_file": "HERE/rows/malay.jsonl"}),
    ],
)
def test_a_variable_is_the_flag_of_its_name(resolved, tmp_path, variable, value, settings):
    (before,) = resolved(TASKS="malay")[0].values()
    (run,) = resolved(TASKS="malay", **{variable: value})[0].values()
    assert resolved("--" + variable.lower().replace("_", "-"), value, TASKS="malay")[0] == {run["name"]: run}

    def here(wanted):
        return wanted.replace("HERE", str(tmp_path)) if isinstance(wanted, str) else wanted

    changed = {key: found for key, found in run.items() if key not in NAMES and found != before.get(key)}
    assert changed == {key: here(wanted) for key, wanted in settings.items()}


@pytest.mark.parametrize(
    ("flags", "name", "plans", "base"),
    [
        ("--alpha 0.3", "malay-alpha0.3", "malay", "malay"),
        ("--alpha 0.1", "malay", "malay", "malay"),  # its own
        ("--feature-map calibrated", "malay-calibrated", "malay", "malay"),
        ("--feature-map regression", "malay-regression", "malay-regression", "malay"),
        ("--feature-map regression --alpha 0.07", "malay-alpha0.07-regression", "malay-regression", "malay"),
        ("--source-model a/S", "malay-Malaysian-Llama-3.2-1B-Instruct-from-S", None, "malay"),
        ("--source-base a/B", "malay-since-B", None, "malay"),
        ("--target-model a/T", f"malay-T-from-{OWN_SOURCE}", None, None),
        (
            "--target-model a/T --feature-map regression",
            f"malay-T-from-{OWN_SOURCE}-regression",
            f"malay-T-from-{OWN_SOURCE}-regression",
            f"malay-T-from-{OWN_SOURCE}",
        ),
    ],
)
def test_a_run_is_named_after_what_differs_from_its_experiment(resolved, flags, name, plans, base):
    """So that a second pair, strength or map leaves the first one's folder alone; None: as the run itself."""
    (run,) = resolved("--tasks", "malay", *flags.split())[0].values()
    assert [run[key] for key in NAMES] == [name, "malay", plans or name, base or name]


def test_the_regression_map_comes_with_its_own_settings_unless_others_are_asked_for(resolved):
    keys = ("pooling", "top_k", "alpha", "train_alpha")
    (run,) = resolved(TASKS="thai", FEATURE_MAP="regression")[0].values()
    assert [run[key] for key in keys] == ["token", 0, 0.1, 0.1]
    (run,) = resolved("--top-k", 5, "--train-alpha", 0.2, TASKS="thai", FEATURE_MAP="regression", ALPHA="0.3")[
        0
    ].values()
    assert [run[key] for key in keys] == ["token", 5, 0.3, 0.2]
    (run,) = resolved(TASKS="demo", FEATURE_MAP="regression")[0].values()  # whose own map it is
    assert (run["name"], run["alpha"]) == ("demo", "auto")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--alpha 0.01", "cantonese-alpha0.01"),  # its own in fusion, but trained with 0.1
        ("--alpha 0.1", "cantonese-alpha0.1"),
        ("--alpha 0.01 --train-alpha 0.1", "cantonese"),
        ("--alpha 0.12345678", "cantonese-alpha0.12345678"),
        ("--train-alpha 0.2", "cantonese-alpha0.01-train0.2"),
        ("--alpha-search 0.03,0.1", "cantonese-alpha0.01-train0.03+0.1"),
    ],
)
def test_a_run_is_named_after_both_strengths(resolved, flags, name):
    """The experiment fuses with 0.01 and trains with 0.1: another training must not take the place of its own."""
    assert list(resolved("--tasks", "cantonese", *flags.split())[0]) == [name]


def test_two_starts_of_one_run_do_not_share_what_its_stages_read(resolved, tmp_path):
    """The second start changes the copy in the run folder, and not the file that the first one hands to its stages."""
    resolved("--tasks", "malay", "--sft-samples", 8)
    first = tmp_path / "work/malay/experiment.yaml"
    assert yaml.safe_load(first.read_text()) == yaml.safe_load((tmp_path / "results/malay/experiment.yaml").read_text())
    (tmp_path / "work").rename(tmp_path / "first")
    _, script = resolved("--tasks", "malay", "--sft-samples", 4)
    assert script["CONFIGS"] == [f"{tmp_path}/work/malay/experiment.yaml"]
    read = [tmp_path / f"{folder}/malay/experiment.yaml" for folder in ("first", "work", "results")]
    assert [yaml.safe_load(path.read_text())["sft_samples"] for path in read] == [8, 4, 4]


def test_strengths_to_search_take_the_place_of_the_one_in_training(resolved):
    (run,) = resolved("--alpha-search", "0.03,0.1", TASKS="malay", ALPHA="0.2")[0].values()
    assert (run["alpha"], run["train_alpha"], run["alpha_search"]) == (0.2, None, [0.03, 0.1])


def test_a_folder_of_another_pair_with_the_same_name_is_not_emptied(resolved, tmp_path):
    resolved("--tasks", "malay", "--target-model", "one/T")
    with pytest.raises(UserError, match=r"is of one/T and .* and would be emptied for two/T"):
        resolved("--tasks", "malay", "--target-model", "two/T")
    resolved("--tasks", "malay", "--target-model", "one/T")


def test_plans_of_another_pair_are_not_emptied_by_another_strength(resolved, tmp_path):
    """Whose run has a name of its own, but uses the same plans."""
    write_plans(tmp_path / f"results/malay-T-from-{OWN_SOURCE}/plans", ("one/T", None))
    with pytest.raises(UserError, match=r"plans is of one/T and .* and would be emptied for two/T"):
        resolved("--tasks", "malay", "--target-model", "two/T", "--alpha", 0.3)
    resolved("--tasks", "malay", "--target-model", "one/T", "--alpha", 0.3)


def test_two_revisions_of_a_model_are_two_runs(resolved, tmp_path):
    ours = "malay-Malaysian-Llama-3.2-1B-Instruct"
    for flags, name in (
        ("--source-model a/S --source-revision aaa", f"{ours}-from-S@aaa"),
        ("--source-model a/S --source-revision refs/pr/1", f"{ours}-from-S@refs-pr-1"),
        ("--target-revision v2", f"{ours}@v2-from-{OWN_SOURCE}"),
    ):
        (run,) = resolved("--tasks", "malay", *flags.split())[0].values()
        assert (run["name"], run["plans_from"]) == (name, name)
    with pytest.raises(UserError, match=r"is of .* and a/S@refs/pr/1, and would be emptied for .* and a/S@refs-pr-1;"):
        resolved("--tasks", "malay", "--source-model", "a/S", "--source-revision", "refs-pr-1")


def test_revisions_of_plans_are_compared(resolved, tmp_path):
    write_plans(tmp_path / f"results/malay-T-from-{OWN_SOURCE}/plans", ("one/T", "aaa"))
    with pytest.raises(UserError, match=r"plans is of one/T@aaa and .* and would be emptied for one/T and"):
        resolved("--tasks", "malay", "--target-model", "one/T")


def test_damaged_plans_are_refused_by_name(resolved, tmp_path):
    manifest = write_plans(tmp_path / "results/malay/plans", ("one/T", None))
    for damaged in ("[]", "{}", '{"inputs": {"target": 3}}', '{"inp'):
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=r"malay/plans/manifest.json is (damaged|not valid JSON)"):
            resolved("--tasks", "malay")


def test_a_model_may_be_given_by_its_folder_or_below_models_root(resolved, tmp_path):
    (tmp_path / "models/one/T").mkdir(parents=True)
    variables = {"TASKS": "malay", "MODELS_ROOT": "models"}
    (run,) = resolved("--target-model", "one/T", **variables)[0]
    assert list(resolved("--target-model", "models/one/T", **variables)[0]) == [run]


@pytest.mark.parametrize("flag", ["--max-samples 40", "--device meta", "--split-seed 3", "--eta 0.3"])
def test_plans_that_other_runs_use_are_not_emptied_by_a_variant(resolved, tmp_path, flag, monkeypatch):
    """Another strength uses the plans of the pair, with the settings that they were made with."""
    monkeypatch.setattr("core.runs.settings.check_device", lambda _: None)
    (run,) = resolved("--tasks", "malay", "--max-samples", 160)[0].values()
    plans = tmp_path / "results/malay/plans"
    write_plans(plans, (run["target_model"], None), source=run["source_model"])
    save_resolved(Experiment.of(**run), "1", plans)
    resolved("--tasks", "malay", "--max-samples", 160, "--alpha", 0.3)
    with pytest.raises(UserError, match=r"malay/plans was made with \w+ [\w.]+, not [\w.]+, and would be emptied"):
        resolved("--tasks", "malay", "--max-samples", 160, "--alpha", 0.3, *flag.split())
    resolved("--tasks", "malay", *flag.split())  # the run itself may make its own plans anew
    resolved("--tasks", "malay", "--alpha", 0.3, "--steps", "fuse", *flag.split())  # which makes no plans


@pytest.mark.parametrize("flags", ["--limit 5", "--prompt plain", "--benchmark-data items", "--llama-name yes"])
def test_scores_of_other_items_or_prompts_do_not_replace_the_shared_ones(resolved, flags):
    (run,) = resolved("--tasks", "malay", "--alpha", 0.3, *flags.split())[0].values()
    assert run["base_from"] == run["name"] == "malay-alpha0.3"


def test_relative_paths_are_meant_from_where_the_script_is_started(resolved, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "rows/thai").mkdir(parents=True)
    variables = {"WORKSPACE_ROOT": "space", "LM_EVAL_TASKS": "own", "DATA_DIR": "rows", "TRANSPORT_RESULTS_ROOT": ""}
    runs, script = resolved("--target-model", "small", "--source-model", "no/path", TASKS="thai", **variables)
    run = runs["thai-small-from-path"]
    assert (run["target_model"], run["source_model"]) == (f"{tmp_path}/small", "no/path")
    assert run["data_file"] == f"{tmp_path}/rows/thai"  # a folder, where there is no .jsonl
    folders = {"MODELS_ROOT": "space/models", "TRANSPORT_RESULTS_ROOT": "space/runs", "LM_EVAL_TASKS": "own"}
    assert {name: script[f"export {name}"] for name in folders} == {
        name: [f"{tmp_path}/{folder}"] for name, folder in folders.items()
    }


def test_gpus_launch_stages_1_and_3_and_a_dry_run_writes_no_run(resolved, tmp_path):
    runs, script = resolved(TASKS="thai", NUM_GPUS="2", DRY_RUN="1", SEEDS="0 1", STEPS="plans general")
    assert runs["thai"]["device"] == "cuda" and not (tmp_path / "results").exists()
    assert script["LAUNCH"] == ["accelerate", "launch", "--num_processes", "2"]
    assert (script["DRY_RUN"], script["SEEDS"]) == (["--dry-run", "--device", "cpu"], ["0", "1"])
    assert script["STEPS"] == ["plans", "general"]  # without tables, which a dry run does not make
    assert resolved(TASKS="thai", DRY_RUN="0")[1]["SEEDS"] == []  # each run trains with the seed of its own settings


def test_every_flag_of_every_stage_works_but_those_that_the_script_sets(resolved):
    parser = recipe_flags.make_parser("")
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for name, setting in all_settings().items():
        flag = f"--{name.replace('_', '-')}"
        assert (flag in flags) == bool(setting.stages and name not in recipe_flags.SET_BY_SCRIPT)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"STEPS": "plans tables"}, "STEPS=plans tables: .*'tables'; expected one of: plans fuse train eval general"),
        ({"FEATURE_MAP": "ot"}, "FEATURE_MAP=ot: .*invalid choice: 'ot' .choose from '?coupling"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS=two: .*expected a whole number"),
        ({"NUM_GPUS": "-1"}, "NUM_GPUS=-1: .*expected a whole number"),
        ({"NUM_GPUS": "1"}, "device 'cuda' is not available here"),
        ({"SEEDS": "0 a"}, "SEEDS=0 a: .*'a'; expected whole numbers"),
        ({"TASKS": "thai nothing"}, "TASKS=thai nothing: .*'nothing'; expected one of: cantonese .* thai"),
        ({"TASKS": " "}, "TASKS= : .*it is empty"),
        ({"ALPHA": "2"}, "alpha is 2.0; expected a number from 0 to 1"),
        ({"MAX_SAMPLES": "few"}, "MAX_SAMPLES=few: .*invalid int value"),
        ({"MAX_SAMPLES": "3"}, "calibration_samples is 3; plans need at least 16 texts"),
        ({"DRY_RUN": "yes"}, "DRY_RUN=yes: expected 0 or 1"),
        ({"DATA_DIR": "typo"}, "DATA_DIR=.*/typo is no folder; give one that has TASK.jsonl"),
        ({"LM_EVAL_REPO": "here"}, "LM_EVAL_REPO=.*/here is no clone of lm-evaluation-harness"),
        ({"VARIANT": "size"}, "VARIANT=size: expected one of: source_size source_family alpha"),
    ],
)
def test_a_wrong_variable_is_refused_before_anything_runs(resolved, tmp_path, variables, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=message):
        resolved(**variables)
    assert not (tmp_path / "results").exists() and not (tmp_path / "work/settings.sh").exists()


def test_a_wrong_flag_is_refused(resolved):
    for flag in ("--training-scenario", "--out-dir", "--klingon"):
        with pytest.raises(UserError, match=f"unrecognized arguments: {flag}"):
            resolved(flag, "hot")
