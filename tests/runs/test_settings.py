"""Settings: experiment files, their values, and which of them are part of a fingerprint."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from core.errors import UserError
from core.fusion.settings import FusionSettings
from core.runs.command_line import EXPERIMENTS, load_experiment
from core.runs.settings import Experiment, all_settings


def values(experiment, *names):
    return tuple(experiment.value(all_settings()[name]) for name in names)


def test_demo_is_the_setting_that_was_measured():
    demo = Experiment.of(**load_experiment(EXPERIMENTS / "demo.yaml"))
    fusion = ("feature_map", "residual_form", "projections", "rows", "alpha", "top_k")
    assert values(demo, *fusion) == ("regression", "interpolate", "all", "aligned", "auto", 0)
    reading = ("pooling", "max_rows", "calibration_samples", "max_tokens")
    assert values(demo, *reading) == ("token", 4096, 160, 110)
    training = ("sft_samples", "block_size", "train_batch_size", "gradient_accumulation", "learning_rate", "epochs")
    assert values(demo, *training) == (96, 110, 1, 4, 2e-5, 1.0)
    assert demo.epsilon == 0.1 and demo.evaluation.held_out_samples == 64 and demo.run_dir == Path("runs/demo")


def test_quick_is_the_same_on_less_data():
    full, quick = (Experiment.of(**load_experiment(EXPERIMENTS / "demo.yaml", quick)) for quick in (False, True))
    assert quick.name == "demo-quick"
    for name in ("calibration_samples", "max_rows", "sft_samples", "held_out_samples"):
        assert values(quick, name) < values(full, name)
    same = ("feature_map", "alpha", "seed")
    assert values(quick, *same) == values(full, *same)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_file_loads(path):
    Experiment.of(**load_experiment(path)).check()


def test_gsm8k_has_its_own_epsilon():
    assert Experiment.of(data_subset="gsm8k").epsilon == 0.03
    assert Experiment.of(data_subset="file").epsilon == 0.1
    assert Experiment.of(data_subset="gsm8k", epsilon=0.2).epsilon == 0.2


def test_a_run_may_use_the_plans_of_another():
    experiment = Experiment.of(name="a")
    assert experiment.folder("plans") == Path("runs/a/plans")
    shared = experiment.changed(plans_from="b")
    assert shared.folder("plans") == Path("runs/b/plans") and shared.folder("fused") == Path("runs/a/fused")


def test_relative_paths_of_a_file_are_meant_from_the_repository(tmp_path, monkeypatch):
    """From whatever folder a command is started. A model that is no folder there is the name of one."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.yaml"
    file.write_text("{data_file: data/rows.jsonl, general_file: /data/g.txt, target_model: core, source_model: a/b}")
    assert load_experiment(file) == {
        "name": "x",
        "data_file": f"{ROOT}/data/rows.jsonl",
        "general_file": "/data/g.txt",
        "target_model": f"{ROOT}/core",
        "source_model": "a/b",
    }


def test_copies_of_the_template_are_runs_of_their_own(tmp_path):
    """Named after their files, as the main script names them."""
    shutil.copy(ROOT / "scripts/experiments/template.yaml", tmp_path / "mine.yaml")
    assert load_experiment(tmp_path / "mine.yaml")["name"] == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alfa: 0.1", "unknown key 'alfa'; did you mean alpha"),
        ("quick: {lines: 3}", "unknown key 'lines'"),
        ("klingon: 1", "unknown key 'klingon'; no key has a name like this; docs/stages.md lists all keys"),
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


# Stage -> the settings that change the bytes of its output, and so are part of its fingerprint.
CHANGES = {
    "1": "device dtype seed max_tokens pooling max_rows tokens_per_batch device_map epsilon eta sinkhorn_iters "
    "sinkhorn_tol sinkhorn_mode layer_cost_scale projections",
    "2": "device feature_map residual_form alpha projections rows top_k p_topk q_topk ridge max_shard_size alpha_steps "
    "free_alpha dtype seed tokens_per_batch validation_samples",
    "3": "device dtype seed tokens_per_batch max_shard_size training_scenario freeze_strategy train_alpha block_size "
    "packing epochs train_batch_size gradient_accumulation gradient_checkpointing learning_rate lr_scheduler "
    "warmup weight_decay max_grad_norm save_steps validation_samples eval_steps early_stop alpha_search lr_search "
    "use_lora lora_rank lora_alpha lora_dropout lora_targets distill_by distill_weight distill_temperature",
    "e": "device dtype seed max_tokens tokens_per_batch",
}
# Stage -> the settings that only name an input. The contents of the model or of the rows are recorded in their place.
INPUTS = {
    "1": "target_model target_revision source_model source_revision source_base source_base_revision data_subset "
    "data_file max_rows_read group_column split_seed calibration_samples general_share general_file general_subset",
    "2": "target_model target_revision source_model source_revision source_base source_base_revision data_subset "
    "data_file max_rows_read group_column split_seed",
    "3": "source_model source_revision data_subset data_file max_rows_read group_column split_seed sft_samples",
    "e": "target_model target_revision source_model source_revision source_base source_base_revision data_subset "
    "data_file max_rows_read group_column split_seed held_out_samples general_file general_subset",
}
# Stage -> the settings on which no byte of its output depends: they say where, how fast, or what else is done.
WITHOUT_EFFECT = {
    "1": "trust_remote_code activations_budget_mb pairs_budget_mb",
    "2": "trust_remote_code push_to_hub",
    "3": "trust_remote_code push_to_hub model_type report_to save_untrained_folded",
    "e": "trust_remote_code controls learned_arm",
}
# Type of a setting -> a value that none of them has by default.
OTHERS = {str: "another", int: 7, float: 0.77, bool: True, tuple: (0.5,)}


LORA, DISTILL, TOKEN = {"use_lora": True}, {"training_scenario": "distill"}, {"pooling": "token"}
LEARNED = {"alpha": "learned"}
# Setting -> the values of others without which it changes nothing.
NEEDS: dict[str, dict] = {
    "max_rows": TOKEN,
    "seed": TOKEN | LEARNED,
    **dict.fromkeys(("dtype", "tokens_per_batch", "validation_samples", "alpha_steps", "free_alpha"), LEARNED),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), LORA),
    **dict.fromkeys(("distill_by", "distill_weight", "distill_temperature"), DISTILL),
    "save_steps": {"early_stop": 3},
}


@pytest.mark.parametrize("stage", CHANGES)
def test_every_setting_of_a_stage_is_decided_and_a_changed_one_changes_the_fingerprint(stage):
    """A new setting fails here until somebody has decided what it changes."""
    names = [name for name, setting in all_settings().items() if stage in setting.stages]
    decided = [*CHANGES[stage].split(), *INPUTS[stage].split(), *WITHOUT_EFFECT[stage].split()]
    assert sorted(decided) == sorted(names)
    for name in names:
        before = Experiment.of(**NEEDS.get(name, {}))
        changed = before.changed(**{name: OTHERS[all_settings()[name].kind]}).deciding(stage)
        assert (changed != before.deciding(stage)) == (name in CHANGES[stage].split()), name


@pytest.mark.parametrize(
    ("stage", "others", "names"),
    [
        ("1", {"pooling": "text"}, "seed max_rows"),
        ("3", {"training_scenario": "no_hot"}, "freeze_strategy train_alpha alpha_search distill_by distill_weight"),
        ("3", {"training_scenario": "distill"}, "freeze_strategy train_alpha alpha_search"),
        ("3", {"training_scenario": "distill", "distill_by": "answers"}, "distill_weight distill_temperature"),
        ("3", {"training_scenario": "hot"}, "distill_by distill_weight distill_temperature"),
        ("3", {"use_lora": False}, "lora_rank lora_alpha lora_dropout lora_targets"),
        ("3", {"lr_search": (0.1,)}, "learning_rate"),
        ("3", {"early_stop": None}, "save_steps"),
        ("3", {"early_stop": 3}, "eval_steps"),
    ],
)
def test_a_setting_that_changes_nothing_with_the_others_is_in_no_fingerprint(stage, others, names):
    """Or a finished folder would be emptied for it."""
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
