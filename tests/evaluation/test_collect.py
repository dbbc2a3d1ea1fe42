"""The scores of all runs as tables: differences on the same items, the paper's layout, what is not current."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import run_main

from core.errors import UserError
from core.files import digest_of
from core.manifest import FORMAT_VERSION
from evaluation import collect_results
from evaluation.scores import Score, finished, mean_and_error, write_score
from evaluation.significance import holm, paired
from evaluation.tables.arm_scores import ArmScore
from evaluation.tables.layout import benchmark_table, heading
from evaluation.tables.rows import benchmark_rows, mean_parts

# A manifest of ours that says nothing else.
EMPTY_MANIFEST = json.dumps({"format": FORMAT_VERSION})


def test_parts_of_a_mean():
    names = ["arc_id", "truthfulqa_id_mc1", "truthfulqa_id_mc2"]
    assert mean_parts(names, [names[1:]]) == [["arc_id"], ["truthfulqa_id_mc1", "truthfulqa_id_mc2"]]
    assert mean_parts(["a", "b"], []) == [["a"], ["b"]]
    assert mean_and_error([1.0, 0.0, 1.0, 1.0]) == {"value": 0.75, "stderr": 0.25, "n": 4}


def scored(*runs, **more) -> ArmScore:
    """The score of one arm on one benchmark, one list of item scores per seed."""
    return ArmScore("acc", [str(n) for n in range(len(runs[0]))], list(runs), **more)


def test_benchmarks_on_the_same_questions_are_one_part_of_the_mean():
    """mc1 and mc2 ask the same questions, and two copies of one difference say no more than one of them."""
    rng = np.random.default_rng(0)
    base, ours = rng.uniform(size=(2, 40))
    other_base, other = rng.uniform(size=(2, 60))
    arms = {
        "base": {"a": scored(other_base), "mc1": scored(base), "mc2": scored(base)},
        "fused": {"a": scored(other), "mc1": scored(ours), "mc2": scored(ours)},
    }
    both = benchmark_rows(arms, {"counted_once": [["mc1", "mc2"]]})["mean"]["fused"]
    alone = benchmark_rows({arm: {"a": s["a"], "mc1": s["mc1"]} for arm, s in arms.items()}, {})["mean"]["fused"]
    assert both["diff"] == pytest.approx(alone["diff"]) and both["ci95"] == pytest.approx(alone["ci95"])
    value = 100 * (other.mean() + ours.mean()) / 2
    assert both["value"] == pytest.approx(value)
    for scores in arms.values():  # with different items, each has half of the part
        scores["mc2"] = dataclasses.replace(scores["mc2"], ids=[f"x{n}" for n in range(40)])
    apart = benchmark_rows(arms, {"counted_once": [["mc1", "mc2"]]})["mean"]["fused"]
    assert (
        apart["value"] == pytest.approx(value)
        and apart["ci95"][1] - apart["ci95"][0] < both["ci95"][1] - both["ci95"][0]
    )


def put(folder, task, benchmarks, limit=None, data="d", model="w"):
    """Write the score files of one arm as run_task.py does; `benchmarks`: name -> scores, or why it is absent."""
    found = {}
    for name, items in benchmarks.items():
        if isinstance(items, str):
            found[name] = {"absent": items}
            continue
        groups = ["STEM" if n % 2 else "Humanities" for n in range(len(items))] if name == "malay_mmlu" else ()
        score = Score(name, [str(n) for n in range(len(items))], {"first_token": items}, groups, metric="first_token")
        write_score(folder / f"{name}.json", score, {"model": {"weights": model, "dtype": "auto"}, "data": data})
        found[name] = {"file": f"{name}.json"}
    record = {"task": task, "model": "m", "limit": limit, "benchmarks": found}
    (folder / "task.json").write_text(json.dumps(record))


@pytest.fixture
def results(tmp_path):
    """A run with coupling that has all arms, and a run with regression that shares its base."""
    runs, right, better = tmp_path / "runs", [0.0, 1.0] * 10, [0.0, 1.0] * 5 + [1.0] * 10
    scores = runs / "malay/benchmarks/malay"
    put(scores / "base", "malay", {"malay_mmlu": right, "arc_id": "no network"})
    put(scores / "fused", "malay", {"malay_mmlu": better, "arc_id": "no network"})
    for seed, items in enumerate((better, right)):
        put(scores / f"fused_adapted/seed{seed}", "malay", {"malay_mmlu": items})
    put(runs / "malay-regression/benchmarks/malay/fused", "malay", {"malay_mmlu": [1.0] * 20})
    gain = {"diff": -0.1, "ci95": [-0.2, -0.05]}
    arms = {
        "base": {"nll": 3.0, "diff": 0.0, "ci95": [0.0, 0.0], "fused_minus_arm": gain},
        "fused": {"nll": 2.9, **gain},
    }
    held_out = {"texts": 64, "tokens": 900, "groups": 12}
    for name in ("malay", "malay-regression"):
        (runs / name / "fused").mkdir()
        (runs / name / "fused/manifest.json").write_text(EMPTY_MANIFEST)
        (runs / name / "fused/resolved.yaml").write_text(
            "{target_model: small, source_model: big, feature_map: coupling, alpha: 0.1, top_k: 0}"
        )
        (runs / name / "results.json").write_text(
            json.dumps({"format": FORMAT_VERSION, "arms": arms, "held_out": held_out})
        )
    return runs


def test_tables_stand_beside_the_papers_figures(results, capsys):
    put(results / "medical/benchmarks/medical/base", "medical", {"mmlu_anatomy": [1.0]})  # scores of a base, no run
    run_main(collect_results, "--results-dir", results)
    printed = capsys.readouterr().out
    assert (results / "tables/malay.md").read_text() in printed
    found = json.loads((results / "tables/malay.json").read_text())
    rows = found["runs"]["malay"]["sets"]["malay"]
    arms = rows["rows"]["malay_mmlu"]["arms"]
    assert [arms[arm]["value"] for arm in ("base", "fused", "fused_adapted")] == [50.0, 75.0, 62.5]
    right, better = [0.0, 1.0] * 10, [0.0, 1.0] * 5 + [1.0] * 10
    single, seeds = paired([better], right), paired([better, right], right)
    assert arms["fused"]["diff"] == 25 and arms["fused"]["p"] == single.p
    assert arms["fused"]["ci95"] == pytest.approx([100 * end for end in single.ci95])
    # One of two seeds gained as much as fused and the other nothing: their spread is part of the interval.
    adapted = arms["fused_adapted"]
    assert adapted["diff"] == 12.5 and adapted["p"] == seeds.p and adapted["seeds"] == 2
    assert adapted["ci95"][0] < -50 and seeds.seed_variance > seeds.variance
    groups = rows["rows"]["malay_mmlu"]["groups"]
    values = {arm: score["value"] for arm, score in groups["Humanities"].items()}
    assert values == {"base": 0, "fused": 50, "fused_adapted": 25}
    assert groups["Humanities"]["fused"]["ci95"] == pytest.approx(
        [100 * end for end in paired([[1.0] * 5 + [0.0] * 5], [0.0] * 10).ci95]
    )
    assert {arm: score["value"] for arm, score in rows["mean"].items()} == {
        "base": 50,
        "fused": 75,
        "fused_adapted": 62.5,
    }
    assert rows["mean"]["fused"]["p"] == arms["fused"]["p"]  # one benchmark is its own mean
    tested = {
        (part, arm): score["p"]
        for part, scores in (("all", arms), *groups.items())
        for arm, score in scores.items()
        if arm != "base"
    }
    assert arms["fused"]["p_holm"] == holm(tested)["all", "fused"] and len(tested) == 6
    assert "Holm's correction over the 6 differences of this table" in printed
    assert rows["normalised"]["fused"]["min_max"] == 1 and rows["absent"] == {"arc_id": "no network"}
    assert "| Humanities | 42.30 | 46.19 | 48.81 | 0.00 | 50.00 (+50.00 [" in printed
    assert "| Language | 38.37 | 40.52 | 41.68 |  |  |  |  |" in printed
    assert "Absent: arc_id: no network" in printed and "small <- big, coupling, alpha 0.1, k all" in printed
    shared = found["runs"]["malay-regression"]["sets"]["malay"]
    assert shared["rows"]["malay_mmlu"]["arms"]["base"]["value"] == 50
    assert shared["rows"]["malay_mmlu"]["arms"]["fused"]["diff"] == 50
    assert shared["normalised"] == {}  # of two arms, one would be 0 and the other 1 whatever they scored
    assert "| fused | -0.1000 [-0.2000, -0.0500] | -0.1000 [-0.2000, -0.0500] |" in printed
    assert "malay: 64 texts of 12 groups, 900 tokens. The intervals rest on only 12 groups and are rough." in printed
    assert "| mean |  |  |  | 50.00 | 75.00 (+25.00 [" in printed
    assert "medical" not in printed
    before = {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    run_main(collect_results, "--results-dir", results)
    assert {path.name: path.read_bytes() for path in (results / "tables").iterdir()} == before


def test_both_strengths_are_in_the_heading_where_they_differ(results, capsys):
    for seed in (0, 1):
        folder = results / f"malay/adapted/hot/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "chosen": {"alpha": 0.005}}))
    run_main(collect_results, "--results-dir", results)
    printed = capsys.readouterr().out
    assert "small <- big, coupling, alpha 0.1 (0.005 while training), k all" in printed
    used = {"target_model": "a", "source_model": "b", "feature_map": "m", "alpha": 0.1, "top_k": 8}
    assert heading({**used, "train_alpha": [0.1]}) == "a <- b, m, alpha 0.1, k 8"


def test_learned_strengths_are_in_the_heading_once(results, capsys):
    for seed in (0, 1):
        folder = results / f"malay/adapted/hot/seed{seed}"
        folder.mkdir(parents=True)
        chosen = {"alpha": {"0.q": 0.25, "0.o": -0.05}}
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "chosen": chosen}))
    run_main(collect_results, "--results-dir", results)
    words = "one for each of 2 projections, from -0.050 to 0.250, 0.100 on average"
    assert f"alpha 0.1 ({words} while training), k all" in capsys.readouterr().out


def test_the_base_is_the_one_that_the_experiment_file_of_the_run_names(results):
    """Also where the run has scores of the base of its own, of an earlier start with other items."""
    put(results / "malay-regression/benchmarks/malay/base", "malay", {"malay_mmlu": [0.0] * 5}, limit=5)

    def rows(base):
        (results / "malay-regression/experiment.yaml").write_text(f"base_from: {base}")
        run_main(collect_results, "--results-dir", results)
        collected = json.loads((results / "tables/malay.json").read_text())["runs"]["malay-regression"]["sets"]
        return collected["malay"]["rows"]

    assert rows("malay").keys() == {"malay_mmlu"} and not rows("malay-regression")


def why_malay_has_no_table(results) -> str:
    """Collect the results, in which the malay run must have no table of benchmarks, and return why."""
    run_main(collect_results, "--results-dir", results)
    runs = json.loads((results / "tables/malay.json").read_text())["runs"]
    assert runs["malay-regression"]["sets"]["malay"]["rows"]  # the other run has its table all the same
    found = runs["malay"]["sets"]["malay"]
    assert not found["rows"]
    return found["absent"]["all"]


def test_scores_that_cannot_be_compared_are_replaced_by_the_reason(results, fails):
    scores = results / "malay/benchmarks/malay"
    put(scores / "fused", "malay", {"malay_mmlu": [1.0] * 20}, data="another copy")
    assert "malay_mmlu: fused and base were scored on other items" in why_malay_has_no_table(results)
    put(scores / "fused_adapted/seed1", "malay", {"malay_mmlu": [1.0] * 20}, data="another copy")
    assert "has other items than another seed's" in why_malay_has_no_table(results)
    put(scores / "fused_adapted/seed1", "malay", {"malay_mmlu": "no network"})
    put(scores / "fused", "malay", {"malay_mmlu": [1.0] * 20})
    manifest = {
        "format": FORMAT_VERSION,
        "inputs": {"target": {"weights": "of another", "config": "c"}},
        "fingerprint": None,
    }
    (results / "malay/fused/manifest.json").write_text(json.dumps(manifest))
    assert "the base that was scored is not the target of" in why_malay_has_no_table(results)
    (results / "malay/fused/manifest.json").write_text(EMPTY_MANIFEST)
    path = scores / "fused/malay_mmlu.json"
    path.write_text(path.read_text().replace('"weights": "w"', '"weights": "w", "made": "before"'))
    assert "it was made anew since" in why_malay_has_no_table(results)
    assert "has no run of thai" in fails(collect_results, "--results-dir", results, "--tasks", "thai")


def test_scores_of_trainings_that_were_made_anew_or_are_gone_are_replaced_by_the_reason(results):
    folder = results / "malay/adapted/hot/seed1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "fingerprint": "now"}))
    (results / "malay/adapted/hot/seed1-untrained").mkdir()  # from --save-untrained-folded: no training
    (results / "malay/adapted/hot/seed1-untrained/manifest.json").write_text(EMPTY_MANIFEST)
    assert f"{folder} is not the model that was scored" in why_malay_has_no_table(results)
    path = results / "malay/benchmarks/malay/fused_adapted/seed1/malay_mmlu.json"
    path.write_text(path.read_text().replace('"weights": "w"', '"weights": "w", "made": "now"'))
    run_main(collect_results, "--results-dir", results)
    assert "fused_adapted" in (results / "tables/malay.md").read_text()
    manifest = {"format": FORMAT_VERSION, "fingerprint": "now", "inputs": {"made_by": "an earlier one"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{folder} was trained from another fused model (an earlier one)" in why_malay_has_no_table(results)
    shutil.rmtree(folder)
    assert f"{folder} is not the model that was scored" in why_malay_has_no_table(results)


def test_losses_of_earlier_models_are_replaced_by_the_reason(results):
    path = results / "malay/results.json"
    whole = json.loads(path.read_text())
    manifest = {"format": FORMAT_VERSION, "fingerprint": "f"}
    (results / "malay/adapted/hot/seed0").mkdir(parents=True)
    (results / "malay/adapted/hot/seed0/manifest.json").write_text(json.dumps(manifest))
    (results / "malay/adapted/hot/seed0-untrained").mkdir()
    (results / "malay/adapted/hot/seed0-untrained/manifest.json").write_text(EMPTY_MANIFEST)
    current = {**whole, "inputs": {"fused": None}, "made_from": {"fused_adapted/seed0": digest_of(manifest)}}
    for record, shown in (
        (current, True),
        ({**current, "inputs": {"fused": "old"}}, False),
        ({**current, "made_from": {"fused_adapted/seed0": "old"}}, False),
        ({**current, "made_from": {}}, False),
        ({**current, "format": 2}, False),
    ):
        path.write_text(json.dumps(record))
        run_main(collect_results, "--results-dir", results)
        found = json.loads((results / "tables/malay.json").read_text())["runs"]
        assert ("arms" in found["malay"]["held_out"]) == shown and "arms" in found["malay-regression"]["held_out"]
        reason = f"Absent: malay: {path} is of "
        assert (reason in (results / "tables/malay.md").read_text()) == (not shown)


def test_a_benchmark_that_one_arm_lacks_is_named(results, capsys, caplog):
    put(results / "malay/benchmarks/malay/fused", "malay", {"malay_mmlu": "no network"})
    run_main(collect_results, "--results-dir", results, "--tasks", "malay")
    assert "Absent: malay_mmlu (fused): no network" in (results / "tables/malay.md").read_text()
    shutil.copytree(results / "malay", results / "thai")
    (results / "tables/medical.md").write_text("## medical\n")  # its run is gone
    capsys.readouterr()
    run_main(collect_results, "--results-dir", results, "--tasks", "malay", "indonesian")
    assert "## thai" not in capsys.readouterr().out and "has no run of indonesian" in caplog.text
    for task, listed in (("malay", True), ("thai", True), ("medical", False)):
        assert (f"## {task}\n" in (results / "tables/all.md").read_text()) == listed


def test_a_benchmark_that_one_seed_lacks_has_no_mean(results):
    """Whether the seed's record calls it absent, the seed was scored without it, or the seed was not scored at all."""
    scores = results / "malay/benchmarks/malay/fused_adapted"

    def collected() -> tuple[set, dict]:
        run_main(collect_results, "--results-dir", results)
        found = json.loads((results / "tables/malay.json").read_text())["runs"]["malay"]["sets"]["malay"]
        return set(found["rows"]["malay_mmlu"]["arms"]), found["absent"]

    right = [0.0, 1.0] * 10
    put(scores / "seed0", "malay", {"malay_mmlu": "no network"})
    assert collected()[0] == {"base", "fused"}
    put(scores / "seed0", "malay", {"arc_id": right})
    arms, absent = collected()
    assert arms == {"base", "fused"} and absent["malay_mmlu (fused_adapted)"] == "not run for seed0"
    put(scores / "seed0", "malay", {"malay_mmlu": right})
    assert collected()[0] == {"base", "fused", "fused_adapted"}
    folder = results / "malay/adapted/hot/seed2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION}))
    arms, absent = collected()
    assert arms == {"base", "fused"} and absent["malay_mmlu (fused_adapted)"] == "not run for seed2"


def test_an_older_or_unfinished_run_hides_no_other(results, caplog):
    folder = results / "malay/adapted/hot/seed0"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 2}')
    path = results / "malay-regression/results.json"
    path.write_text(json.dumps({"format": FORMAT_VERSION, "per_text": {}}))
    shutil.copytree(results / "malay-regression", results / "malay-whole")
    shutil.copy(results / "malay/results.json", results / "malay-whole/results.json")
    run_main(collect_results, "--results-dir", results)
    runs = json.loads((results / "tables/malay.json").read_text())["runs"]
    assert "has format 2" in runs["malay"]["held_out"]["absent"]
    assert "is not finished" in runs["malay-regression"]["held_out"]["absent"]
    assert (
        "arms" in runs["malay-whole"]["held_out"]
        and "This run cannot be read" in (results / "tables/malay.md").read_text()
    )


def test_a_category_of_an_extra_benchmark_has_no_figure_of_the_paper():
    categories = ["STEM", "Humanities"] * 10
    rows = {name: scored([0.0, 1.0] * 10, categories=categories, in_place_of=name) for name in ("malay_mmlu", "other")}
    paper = {"benchmarks": ["malay_mmlu"], "rows": {"STEM": [1.0, 2.0, 3.0]}}
    lines = benchmark_table(benchmark_rows({"base": rows, "fused": rows}, paper), paper)
    assert [line.startswith("| STEM | 1.00 |") for line in lines if "STEM" in line] == [True, False]


def test_a_score_file_is_finished_for_its_inputs_alone(tmp_path):
    path = tmp_path / "x/b.json"
    write_score(path, Score("b", ["1", "2"], {"acc": [1, 0]}, metric="acc"), {"limit": 2})
    assert finished(path, {"limit": 2}) and not finished(path, {"limit": 3})
    assert json.loads(path.read_text())["fingerprint"] == digest_of({"limit": 2})
    with pytest.raises(UserError, match="is not valid JSON"):
        path.write_text("{")
        finished(path, {"limit": 2})
