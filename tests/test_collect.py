"""Score files, significance on the same items, and the tables of the paper's layout."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import run_main

from core.runs import FORMAT_VERSION, UserError, digest_of
from evaluation import collect_results
from evaluation.collect_results import mean_score
from evaluation.scores import Score, finished, mean_and_error, write_score
from evaluation.significance import normalised, paired

# A manifest that says nothing else.
OURS = json.dumps({"format": FORMAT_VERSION})


def test_mcnemar_is_the_exact_binomial_of_the_discordant_items():
    a, b = [1.0] * 9 + [0.0] * 3 + [1.0] * 20, [0.0] * 9 + [1.0] * 3 + [1.0] * 20
    found = paired(a, b)
    by_hand = 2 * sum(math.comb(12, k) for k in range(4)) / 2**12
    assert found["p"] == pytest.approx(by_hand) and (found["won"], found["lost"]) == (9, 3)
    assert found["diff"] == pytest.approx(6 / 32) and found["ci95"][0] < 6 / 32 < found["ci95"][1]
    assert paired(a, a) | {"test": ""} == {"diff": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "test": "", "won": 0, "lost": 0}
    assert paired(b, a)["diff"] == -found["diff"] and paired(b, a)["p"] == found["p"]
    with pytest.raises(ValueError, match="32 and 31 items"):
        paired(a, a[1:])


def test_bootstrap_of_real_scores_covers_the_known_error():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
    found = paired(a.tolist(), b.tolist())
    half_width = 1.96 * (a - b).std(ddof=1) / 20
    assert found["test"] == "paired bootstrap" and found["diff"] == pytest.approx((a - b).mean())
    assert (found["ci95"][1] - found["ci95"][0]) / 2 == pytest.approx(half_width, rel=0.05)
    assert found["p"] < 0.01 and paired(b.tolist(), b[::-1].tolist())["p"] > 0.05


def test_common_scale_and_means():
    found = normalised({"base": 10.0, "fused": 20.0, "no_hot": 30.0})
    assert [each["min_max"] for each in found.values()] == [0, 0.5, 1]
    assert found["no_hot"]["z"] == pytest.approx(10 / math.sqrt(200 / 3)) and found["fused"]["z"] == 0
    assert normalised({"a": 1.0, "b": 1.0})["a"] == {"z": 0.0, "min_max": 0.0}
    values = {"arc_id": 10.0, "truthfulqa_id_mc1": 20.0, "truthfulqa_id_mc2": 40.0}
    assert mean_score(values, [["truthfulqa_id_mc1", "truthfulqa_id_mc2"]]) == 20
    assert mean_score(values, []) == pytest.approx(70 / 3)
    assert mean_and_error([1.0, 0.0, 1.0, 1.0]) == {"value": 0.75, "stderr": 0.25, "n": 4}


def put(folder, task, benchmarks, limit=None, data="d", model="w"):
    """Score files of one arm as run_task leaves them; `benchmarks`: name -> scores, or why it is absent."""
    found = {}
    for name, items in benchmarks.items():
        if isinstance(items, str):
            found[name] = {"absent": items}
            continue
        groups = ["STEM" if n % 2 else "Humanities" for n in range(len(items))] if name == "malay_mmlu" else ()
        score = Score(name, [str(n) for n in range(len(items))], {"first_token": items}, groups)
        write_score(folder / f"{name}.json", score, {"model": {"weights": model, "dtype": "auto"}, "data": data})
        found[name] = {"file": f"{name}.json"}
    record = {"task": task, "model": "m", "limit": limit, "benchmarks": found}
    (folder / "task.json").write_text(json.dumps(record))


@pytest.fixture
def results(tmp_path):
    """A coupling run with everything and a regression run that shares its base."""
    runs, right, better = tmp_path / "runs", [0.0, 1.0] * 10, [0.0, 1.0] * 5 + [1.0] * 10
    place = runs / "malay/benchmarks/malay"
    put(place / "base", "malay", {"malay_mmlu": right, "arc_id": "no network"})
    put(place / "fused", "malay", {"malay_mmlu": better, "arc_id": "no network"})
    for seed, items in enumerate((better, right)):
        put(place / f"fused_adapted/seed{seed}", "malay", {"malay_mmlu": items})
    put(runs / "malay-regression/benchmarks/malay/fused", "malay", {"malay_mmlu": [1.0] * 20})
    interval = {"diff": -0.1, "ci95": [-0.2, -0.05]}
    arms = {"base": {"nll": 3.0, "diff": 0.0, "ci95": [0.0, 0.0]}, "fused": {"nll": 2.9, **interval}}
    for name in ("malay", "malay-regression"):
        (runs / name / "fused").mkdir()
        (runs / name / "fused/manifest.json").write_text(OURS)
        (runs / name / "fused/resolved.yaml").write_text(
            "{target_model: small, source_model: big, feature_map: coupling, alpha: 0.1, top_k: 0}"
        )
        (runs / name / "results.json").write_text(
            json.dumps({"arms": arms, "held_out": {"texts": 64, "tokens": 900}}))  # fmt: skip
    return runs


def test_tables_stand_beside_the_papers_figures(results, capsys):
    put(results / "medical/benchmarks/medical/base", "medical", {"mmlu_anatomy": [1.0]})  # of a variant, not a run
    run_main(collect_results, "--results-dir", results)
    told = capsys.readouterr().out
    assert (results / "tables/malay.md").read_text() in told
    found = json.loads((results / "tables/malay.json").read_text())
    rows = found["runs"]["malay"]["sets"]["malay"]
    arms = rows["rows"]["malay_mmlu"]["arms"]
    assert [arms[arm]["value"] for arm in ("base", "fused", "fused_adapted")] == [50.0, 75.0, 62.5]
    assert arms["fused"]["diff"] == 25 and arms["fused"]["p"] == paired([1.0] * 5, [0.0] * 5)["p"]
    assert arms["fused_adapted"]["diff"] == 12.5 and arms["fused_adapted"]["test"] == "paired bootstrap"
    assert rows["rows"]["malay_mmlu"]["groups"]["Humanities"] == {"base": 0, "fused": 50, "fused_adapted": 25}
    assert rows["mean"] == {"base": 50.0, "fused": 75.0, "fused_adapted": 62.5}
    assert rows["normalised"]["fused"]["min_max"] == 1 and rows["absent"] == {"arc_id": "no network"}
    assert "| Humanities | 42.30 | 46.19 | 48.81 | 0.00 | 50.00 | 25.00 |  |" in told
    assert "| Language | 38.37 | 40.52 | 41.68 |  |  |  |  |" in told
    assert "Absent: arc_id: no network" in told and "small <- big, coupling, alpha 0.1, k all" in told
    shared = found["runs"]["malay-regression"]["sets"]["malay"]["rows"]["malay_mmlu"]["arms"]
    assert shared["base"]["value"] == 50 and shared["fused"]["diff"] == 50
    assert "| fused | -0.1000 [-0.2000, -0.0500] | -0.1000 [-0.2000, -0.0500] |" in told
    assert "medical" not in told and "| mean of those above |  |  |  | 50.00 | 75.00 | 62.50 |  |" in told
    before = {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    run_main(collect_results, "--results-dir", results)
    assert {path.name: path.read_bytes() for path in (results / "tables").iterdir()} == before


def told_of_malay(results) -> str:
    """Why the malay run has no table of benchmarks."""
    run_main(collect_results, "--results-dir", results)
    runs = json.loads((results / "tables/malay.json").read_text())["runs"]
    assert runs["malay-regression"]["sets"]["malay"]["rows"]  # the other run's table is there all the same
    found = runs["malay"]["sets"]["malay"]
    assert not found["rows"]
    return found["absent"]["all"]


def test_scores_that_cannot_be_compared_are_told_in_their_place(results, fails):
    scores = results / "malay/benchmarks/malay"
    put(scores / "fused", "malay", {"malay_mmlu": [1.0] * 20}, data="another copy")
    assert "malay_mmlu: fused and base were scored on other items" in told_of_malay(results)
    put(scores / "fused_adapted/seed1", "malay", {"malay_mmlu": [1.0] * 20}, data="another copy")
    assert "has other items than another seed's" in told_of_malay(results)
    put(scores / "fused_adapted/seed1", "malay", {"malay_mmlu": "no network"})
    put(scores / "fused", "malay", {"malay_mmlu": [1.0] * 20})
    manifest = {
        "format": FORMAT_VERSION,
        "inputs": {"target": {"weights": "of another", "config": "c"}},
        "fingerprint": None,
    }
    (results / "malay/fused/manifest.json").write_text(json.dumps(manifest))
    assert "the base that was scored is not the target of" in told_of_malay(results)
    (results / "malay/fused/manifest.json").write_text(OURS)
    path = scores / "fused/malay_mmlu.json"
    path.write_text(path.read_text().replace('"weights": "w"', '"weights": "w", "made": "before"'))
    assert "it was made anew since" in told_of_malay(results)
    assert "has no run of thai" in fails(collect_results, "--results-dir", results, "--tasks", "thai")


def test_trainings_made_anew_or_gone_since_they_were_scored_are_told(results):
    folder = results / "malay/adapted/hot/seed1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "fingerprint": "now"}))
    (results / "malay/adapted/hot/seed1-untrained").mkdir()  # what --save-untrained-folded writes is no training
    (results / "malay/adapted/hot/seed1-untrained/manifest.json").write_text(OURS)
    assert f"{folder} is not the model that was scored" in told_of_malay(results)
    path = results / "malay/benchmarks/malay/fused_adapted/seed1/malay_mmlu.json"
    path.write_text(path.read_text().replace('"weights": "w"', '"weights": "w", "made": "now"'))
    run_main(collect_results, "--results-dir", results)
    assert "fused_adapted" in (results / "tables/malay.md").read_text()
    manifest = {"format": FORMAT_VERSION, "fingerprint": "now", "inputs": {"made_by": "an earlier one"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{folder} was trained from another fused model (an earlier one)" in told_of_malay(results)
    shutil.rmtree(folder)
    assert f"{folder} is not the model that was scored" in told_of_malay(results)


def test_losses_of_earlier_models_are_told_in_their_place(results):
    path = results / "malay/results.json"
    whole = json.loads(path.read_text())
    manifest = {"format": FORMAT_VERSION, "fingerprint": "f"}
    (results / "malay/adapted/hot/seed0").mkdir(parents=True)
    (results / "malay/adapted/hot/seed0/manifest.json").write_text(json.dumps(manifest))
    (results / "malay/adapted/hot/seed0-untrained").mkdir()
    (results / "malay/adapted/hot/seed0-untrained/manifest.json").write_text(OURS)
    current = {**whole, "inputs": {"fused": None}, "made_from": {"fused_adapted/seed0": digest_of(manifest)}}
    for record, shown in ((current, True), ({**current, "inputs": {"fused": "old"}}, False),
                          ({**current, "made_from": {"fused_adapted/seed0": "old"}}, False),
                          ({**current, "made_from": {}}, False)):  # fmt: skip
        path.write_text(json.dumps(record))
        run_main(collect_results, "--results-dir", results)
        found = json.loads((results / "tables/malay.json").read_text())["runs"]
        assert ("arms" in found["malay"]["held_out"]) == shown and "arms" in found["malay-regression"]["held_out"]
        told = f"Absent: malay: {path} is of earlier models; run evaluation/compare_arms.py again"
        assert (told in (results / "tables/malay.md").read_text()) == (not shown)


def test_a_benchmark_that_one_arm_lacks_is_named(results, capsys, caplog):
    put(results / "malay/benchmarks/malay/fused", "malay", {"malay_mmlu": "no network"})
    run_main(collect_results, "--results-dir", results, "--tasks", "malay")
    assert "Absent: malay_mmlu (fused): no network" in (results / "tables/malay.md").read_text()
    shutil.copytree(results / "malay", results / "thai")
    (results / "tables/medical.md").write_text("## medical\n")  # of a run that is gone
    capsys.readouterr()
    run_main(collect_results, "--results-dir", results, "--tasks", "malay", "indonesian")
    assert "## thai" not in capsys.readouterr().out and "has no run of indonesian" in caplog.text
    for task, there in (("malay", True), ("thai", True), ("medical", False)):
        assert (f"## {task}\n" in (results / "tables/all.md").read_text()) == there


def test_a_benchmark_that_one_seed_lacks_has_no_mean(results):
    put(results / "malay/benchmarks/malay/fused_adapted/seed0", "malay", {"malay_mmlu": "no network"})
    run_main(collect_results, "--results-dir", results)
    found = json.loads((results / "tables/malay.json").read_text())["runs"]["malay"]["sets"]["malay"]
    assert set(found["rows"]["malay_mmlu"]["arms"]) == {"base", "fused"}


def test_a_score_file_is_finished_for_its_inputs_alone(tmp_path):
    path = tmp_path / "x/b.json"
    write_score(path, Score("b", ["1", "2"], {"acc": [1, 0]}), {"limit": 2})
    assert finished(path, {"limit": 2}) and not finished(path, {"limit": 3})
    assert json.loads(path.read_text())["fingerprint"] == digest_of({"limit": 2})
    with pytest.raises(UserError, match="is not valid JSON"):
        path.write_text("{")
        finished(path, {"limit": 2})
