"""Reports of runs that are unfinished, damaged or hold hostile texts, and of several runs beside each other."""

import json
import re
import shutil

import pytest
from browser import LAYOUT, ask, needs_browser, violations
from conftest import run_main
from report_pages import Page, page_of, table

from core.files import digest_of
from evaluation import report
from evaluation.arms.verdict import table as arm_table
from evaluation.pages.facts import facts
from evaluation.pages.index_page import is_current
from evaluation.pages.run_files import RunFiles
from evaluation.pages.siblings import siblings


@pytest.fixture
def run(reported, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(reported, tmp_path / "runs" / "small")


@pytest.mark.parametrize(
    ("gone", "named", "command"),
    [
        ("plans/manifest.json", "layer and neuron plans", "run_activs_and_hot.py"),
        ("fused/manifest.json", "the fused model", "core/generate_hot_residual.py"),
        ("adapted/hot/seed0/manifest.json", "the training fused_adapted/seed0", "--training-scenario hot --seed 0"),
        ("adapted/no_hot", "the training no_hot", "--training-scenario no_hot"),
        ("results.json", "the verdict", "evaluation/compare_arms.py"),
        ("samples.json", "text samples", "evaluation/compare_arms.py"),
    ],
)
def test_what_is_missing_is_named_with_its_command(run, gone, named, command):
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    found = {one.what: one.command for one in RunFiles.read(run).missing}
    assert command in found[named] and found[named].endswith("--config YOURS.yaml")
    depends = {"plans/manifest.json": 1, "fused/manifest.json": 2}  # results of a fused model that is gone
    assert len(found) == depends.get(gone, 2 if gone.startswith("adapted") else 1)


def test_an_unfinished_run_is_shown_from_its_first_stage_on(run, caplog):
    for part in ("fused", "adapted"):
        shutil.rmtree(run / part)
    (run / "results.json").unlink()
    with caplog.at_level("DEBUG"):
        text = page_of(run)
    # How far the drawing is: three figures of the plans, in as many sections.
    assert [line.partition(" in ")[0] for line in caplog.messages if "of 3 " in line] == [
        f"figures of {run.name}: 3 of 3 figures",
        "the page: 3 of 3 sections",
    ]
    assert "No verdict yet" in text and "Which layers correspond?" in text and "What was transported?" not in text
    listed = " ".join(Page(text).words).partition("This run is not complete.")[2]
    assert "python core/generate_hot_residual.py --config YOURS.yaml" in listed and "/tmp/" not in listed


def test_results_of_earlier_models_give_no_verdict(run):
    path = run / "fused/manifest.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    text = page_of(run)
    assert "No verdict yet" in text and "results.json is of earlier models" in text


@pytest.mark.parametrize("how", ["gone", "damaged"])
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("fused/fusion_report.json", "the fused model"),
        ("fused/hot_residual.safetensors", "what was transported"),
        ("plans/selection.safetensors", "what was transported"),
        ("plans/plans/k.safetensors", "figures of the plans"),
        ("samples.json", "text samples"),
    ],
)
def test_a_part_whose_file_is_damaged_is_named_and_the_others_are_shown(run, file, named, how):
    (path,) = run.glob(file)
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:60])
    words = " ".join(Page(page_of(run)).words)
    listed = words.partition("This run is not complete.")[2].partition("Compared")[0]
    assert f"{named}: " in listed and "How the trainings went" in words and "All arms" in words
    run_main(report, run.parent)


def test_samples_of_other_prompts_are_not_shown(run):
    record = json.loads((run / "samples.json").read_text())
    record["texts"]["fused"]["continuations"].pop()
    (run / "samples.json").write_text(json.dumps(record))
    assert "text samples: samples.json does not fit its prompts" in " ".join(Page(page_of(run)).words)


def test_a_run_that_cannot_be_read_hides_no_other(run):
    other = shutil.copytree(run, run.with_name("damaged"))
    (other / "report.html").unlink()
    (other / "report").rename(other / "elsewhere")
    (other / "report").write_text("a file where the folder of figures should be")
    run_main(report, run.parent)
    words = Page((run.parent / "report.html").read_text("utf-8")).words
    assert any("File exists" in text for text in words) and "small" in words


def test_texts_of_models_and_data_are_escaped(run):
    evil = "<script>alert(1)</script>\"'& $\\frac$"  # the last is no formula that matplotlib could set
    for name in ("fused/manifest.json", "samples.json", "results.json"):
        record = json.loads((run / name).read_text())
        if "lineage" in record:
            record["lineage"]["models"]["source"] |= {"name": evil, "licence": {"license": evil}}
        if "prompts" in record:
            record["prompts"][0] = record["texts"]["fused"]["continuations"][0] = evil
        if "arms" in record:
            record["arms"][evil] = record["arms"]["self"]
        (run / name).write_text(json.dumps(record))
    text = page_of(run)
    page = Page(text)
    assert any(evil in words for words in page.words)
    assert "<script>alert" not in text and "alert(1)" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the picker and its data


@needs_browser
def test_hostile_names_run_nothing_in_a_browser(run):
    """Neither does the name of the run, which is that of its folder."""
    shutil.rmtree(run / "plans")  # whose figures take long to draw
    evil = run.rename(run.with_name("<img src=x onerror=failed.push(1)>"))
    for name in ("samples.json", "results.json"):
        text = (evil / name).read_text()
        (evil / name).write_text(text.replace('"self"', '"</script><img src=x onerror=failed.push(2)>"'))
    record = json.loads((evil / "samples.json").read_text())
    record["prompts"][0] = "</pre><script>failed.push(3)</script>"
    (evil / "samples.json").write_text(json.dumps(record))
    page_of(evil)
    assert ask(evil / "report.html", "return document.querySelectorAll('img').length;") == 0  # and nothing failed
    run_main(report, evil.parent)
    assert ask(evil.parent / "report.html", "return document.querySelectorAll('img').length;") == 0


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_runs_in_a_browser(run, width):
    shutil.copytree(run, run.with_name("other"))
    run_main(report, run.parent)
    page = run.parent / "report.html"
    found = ask(
        page, LAYOUT.replace("Math.min(...sizes)", "0").replace("Math.min(...contrasts)", "0"), width, dark=True
    )
    assert found["needed"] <= width and not found["overlaps"]
    assert violations(page, width, dark=True) == []


def test_commands_and_warnings_are_shown_without_tokens_and_folders(run):
    line = {
        "command": ["/home/ann/repo/core/train_hot_residual_sft.py", "--hub-token", "hf_abcdefghijklmnop"],
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        "outcome": "error: /home/ann/models/x is not there",
        "warnings": ["hf_abcdefghijklmnop was refused for /home/ann/models/x"],
    }
    (run / "usage.jsonl").write_text(json.dumps(line) + "\n")
    shown = str(facts(RunFiles.read(run)))  # all that the page says of them
    assert "python core/train_hot_residual_sft.py" in shown and "was refused for x" in shown
    assert "/home" not in shown and "hf_abc" not in shown and str(run.parent) not in shown


def test_a_folder_of_runs_gets_a_page_that_lists_them(run, capsys):
    other = shutil.copytree(run, run.with_name("other <b>"))
    (other / "results.json").unlink()
    (other / "report.html").unlink()
    before = (run / "report.html").stat().st_mtime_ns
    run_main(report, run.parent)
    page = Page((run.parent / "report.html").read_text("utf-8"))
    assert {"small", "other <b>"} <= set(page.words) and "other%20%3Cb%3E/report.html" in page.addresses
    assert any("No verdict yet" in words for words in page.words)
    found = json.loads((run / "results.json").read_text())
    told = arm_table(found["arms"], found["held_out"]).splitlines()  # as stage 4 prints it
    place = page.words.index("small")
    verdict, *diffs = page.words[place + 1 : place + 5]
    assert verdict in told and verdict.startswith(("Transfer: ", "No transfer shown"))
    for arm, diff in zip(("fused", "no_hot", "fused_adapted"), diffs, strict=True):
        assert diff in next(line for line in told if line.startswith(f"{arm} "))
    assert (other / "report.html").is_file() and str(run.parent / "report.html") in capsys.readouterr().out
    assert (run / "report.html").stat().st_mtime_ns == before  # it was current
    (run / "results.json").touch()
    run_main(report, run.parent)
    assert (run / "report.html").stat().st_mtime_ns > before


def test_runs_that_differ_in_strength_alone_are_compared(run):
    shutil.rmtree(run / "plans")  # whose figures take long to draw
    other = shutil.copytree(run, run.with_name("stronger"))
    path = other / "fused/manifest.json"
    path.write_text(path.read_text().replace('"alpha": 0.1', '"alpha": 0.2'))
    page_of(run)
    rows = table(run, "by_strength")
    assert {(row["run"], row["alpha"]) for row in rows} == {("small", "0.1"), ("stronger", "0.2")}
    assert not (run / "report/by_source.csv").exists()
    notes = run / "report/notes.csv"
    notes.write_text("not of the report")
    shutil.rmtree(other)
    assert "Compared with other runs" not in page_of(run)
    assert not list((run / "report").glob("by_strength.*")) and notes.is_file() and table(run, "losses")


def test_a_report_is_drawn_again_where_the_runs_beside_it_are_others_now(run):
    shutil.rmtree(run / "plans")  # whose figures take long to draw
    other = shutil.copytree(run, run.with_name("stronger"))
    assert is_current(run)  # the other run differs in nothing
    changed(run, "stronger", "fused/manifest.json", '"alpha": 0.1', '"alpha": 0.2')
    run_main(report, run.parent)
    for one in (run, other):
        assert {row["run"] for row in table(one, "by_strength")} == {"small", "stronger"} and is_current(one)
    shutil.rmtree(other)
    assert not is_current(run)


def changed(run, name, file, old, new):
    """A copy of the run beside it, with another value in a file."""
    copy = run.with_name(name)
    if not copy.exists():
        shutil.copytree(run, copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    return copy


def test_only_runs_of_the_same_plans_are_compared_by_strength(run):
    other = changed(run, "stronger", "fused/manifest.json", '"alpha": 0.1', '"alpha": 0.2')
    record = json.loads((other / "fused/manifest.json").read_text())
    record["inputs"]["plans"] = "of another calibration"
    (other / "fused/manifest.json").write_text(json.dumps(record))
    assert siblings(RunFiles.read(run)) == ([], [])


def test_trainings_with_other_settings_are_not_compared(run):
    changed(run, "stronger", "fused/manifest.json", '"alpha": 0.1', '"alpha": 0.2')
    assert all("fused_adapted" in point.diffs for point in siblings(RunFiles.read(run))[0])
    path = changed(run, "stronger", "adapted/hot/seed0/manifest.json", '"learning_rate": 0.01', '"learning_rate": 0.5')
    results = json.loads((path / "results.json").read_text())
    record = json.loads((path / "adapted/hot/seed0/manifest.json").read_text())
    results["made_from"]["fused_adapted/seed0"] = digest_of(record)
    (path / "results.json").write_text(json.dumps(results))
    ours, theirs = sorted(siblings(RunFiles.read(run))[0], key=lambda point: point.alpha)
    assert "fused_adapted" in ours.diffs and list(theirs.diffs) == ["fused"]


@pytest.mark.parametrize(("epsilon", "compared"), [("0.1", True), ("0.2", False)])
def test_sources_are_compared_at_any_strength_where_the_plans_have_the_same_settings(run, epsilon, compared):
    """The strength that the search found may be another for every source."""
    for name in ("larger", run.name):
        path = changed(run, name, "fused/manifest.json", '"alpha": 0.1', '"alpha": "auto"') / "fused/manifest.json"
        record = json.loads(path.read_text())
        record["strength"] = {"alpha": {"0.q": 0.1, "0.k": 0.3} if name == "larger" else 0.05}
        if name == "larger":
            record["inputs"]["source"]["weights"] = record["lineage"]["models"]["source"]["name"] = "larger"
        path.write_text(json.dumps(record))
    changed(run, "larger", "plans/manifest.json", '"epsilon": 0.1', f'"epsilon": {epsilon}')
    strengths, sources = siblings(RunFiles.read(run))
    assert not strengths and len(sources) == (2 if compared else 0)
    assert sorted(point.alpha for point in sources) == ([0.05, pytest.approx(0.2)] if compared else [])


def test_a_dry_run_writes_nothing(run, tmp_path, capsys):
    (run / "report.html").unlink()
    for flags in (["--dry-run", run], ["-q", run, "--dry-run"], ["--dry_run", "--run-dir", run, "--max-tokens", 9]):
        run_main(report, *flags)
        assert f"would write {run}/report.html" in capsys.readouterr().out and not (run / "report.html").exists()
    run_main(report, "--run-dir", tmp_path / "none", "--dry-run")  # no stage has run yet
    assert f"{tmp_path}/none does not exist yet" in capsys.readouterr().out


def test_what_is_no_run_is_refused(fails, tmp_path):
    assert "does not exist" in fails(report, tmp_path / "none")
    assert "is no run: it has none of plans" in fails(report, tmp_path)
    assert "no run is given" in fails(report, "--device", "cpu")
    assert "--quick needs --config" in fails(report, tmp_path, "--quick")
    for twice in (["--run-dir", tmp_path], ["--config", tmp_path]):
        assert "more than one run is given" in fails(report, tmp_path, *twice)
    assert "unrecognized arguments: --bogus" in fails(report, tmp_path, "--bogus")


def test_the_help_says_how_a_run_is_named_and_nothing_of_stage_4(capsys):
    with pytest.raises(SystemExit):
        run_main(report, "--help")
    told = capsys.readouterr().out
    assert set(re.findall(r"^  (?:-\w, )?(--[a-z-]+|[a-z]+)[ ,]", told, re.MULTILINE)) == {
        *("run", "--help", "--quiet", "--verbose", "--config", "--quick", "--run-dir", "--dry-run")
    }
