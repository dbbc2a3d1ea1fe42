"""The report of a pico run: its files against the run's own, what is missing, what must not be shown, the index."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import LAYOUT, PICK, ask, chromium, needs_browser
from conftest import ROOT, run_main
from safetensors.torch import load_file
from stages import data_flags, fuse, pair_flags, plan, train

from core.files import digest_of
from core.models.checkpoints import open_checkpoint
from evaluation import compare_arms, report
from evaluation.pages.facts import command_of
from evaluation.pages.paths import without_paths
from evaluation.pages.run_files import RunFiles
from evaluation.pages.siblings import siblings

CAPTURED = {"capture_output": True, "text": True, "check": True}
VOID = {"meta", "link", "br", "img", "input", "hr", "path", "rect", "use", "circle", "line", "image", "stop"}


@pytest.fixture(scope="module")
def whole(models, texts, tmp_path_factory):
    """A finished run with one seed, whose strongest neurons are fused, and its report."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    plans = plan(models, texts, folder / "plans", "--pooling", "token")
    fused = fuse(plans, models, folder / "fused", "--feature-map", "regression", "--top-k", 7)
    for scenario in ("hot", "no_hot"):
        out = folder / "adapted" / scenario / "seed0"
        train(fused, out, "--validation-samples", 4, "--training-scenario", scenario)
    run_main(compare_arms, "--run-dir", folder, *pair_flags(models), *data_flags(texts))
    run_main(report, folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(whole, tmp_path / "runs" / "small")


def page_of(folder):
    run_main(report, folder)
    return (folder / "report.html").read_text("utf-8")


def table(folder, name):
    with (folder / "report" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects ids, addresses and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[name] for name in ("src", "href", "action", "srcset", "data") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_layer_plans_in_the_file_are_those_of_stage_1(whole):
    rows = table(whole, "layer_plans")
    for side in ("q", "k", "v", "o", "attn_in", "o_in"):
        tensors = load_file(whole / f"plans/plans/{side}.safetensors")
        mine = [row for row in rows if row["side"] == side]
        shape = tensors["P"].shape
        assert len(mine) == shape.numel()
        for key in ("P", "layer_cost"):
            told = np.array([float(row[key]) for row in mine]).reshape(shape)
            np.testing.assert_array_equal(told, tensors[key].numpy())
        best = [int(row["source_layer"]) for row in mine if row["is_argmax"] == "1"]
        assert best == tensors["P"].argmax(1).tolist()


def dense_plan(run, side, layer, source_layer):
    """Q and the correlations, from the stored files in float64 without any code of ours."""
    tensors = load_file(run / f"plans/plans/{side}.safetensors")
    rows = [
        load_file(run / f"plans/activations/{model}.safetensors")[f"{side}.{number}"].double().numpy()
        for model, number in (("target", layer), ("source", source_layer))
    ]
    n = rows[0].shape[1]
    R = np.corrcoef(rows[0], rows[1], rowvar=False)[:n, n:]
    f, g = (tensors[key][layer, source_layer].numpy() for key in "fg")
    return np.exp((f[:, None] + g[None] - (1 - R)) / 0.1), R


def test_neuron_matches_and_masses_are_those_of_the_plans(whole):
    matches = table(whole, "neuron_plan")
    side, layer, source_layer = (matches[0][key] for key in ("side", "target_layer", "source_layer"))
    Q, R = dense_plan(whole, side, int(layer), int(source_layer))
    assert len(matches) == 8
    for match in matches:
        i, j = int(match["target_neuron"]), int(match["source_neuron"])
        assert float(match["correlation"]) == pytest.approx(R[i, j], abs=1e-5)
        assert float(match["share"]) == pytest.approx(Q[i, j] * len(Q), rel=1e-4)
    first = matches[0]
    assert (int(first["target_neuron"]), int(first["source_neuron"])) == np.unravel_index(Q.argmax(), Q.shape)

    curves = table(whole, "top_k_mass")
    told = {float(row["share_of_entries"]): float(row["mass"]) for row in curves if row["side"] == "k"}
    P = load_file(whole / "plans/plans/k.safetensors")["P"]
    at_tenth = min(told, key=lambda share: abs(share - 0.1))
    found = []
    for target_layer in range(len(P)):
        largest = np.sort(dense_plan(whole, "k", target_layer, int(P[target_layer].argmax()))[0].ravel())[::-1]
        mass = np.concatenate([[0], largest.cumsum() / largest.sum()])
        found.append(np.interp(at_tenth * len(largest), np.arange(len(mass)), mass))
    assert told[at_tenth] == pytest.approx(np.mean(found), abs=5e-3)


def test_losses_weights_and_curves_are_those_of_the_stages(whole):
    results = json.loads((whole / "results.json").read_text())
    for row in table(whole, "losses"):
        assert float(row["diff"]) == results["arms"][row["arm"]]["diff"]
        assert float(row["nll"]) == results["arms"][row["arm"]]["nll"]
    residuals = load_file(whole / "fused/hot_residual.safetensors")
    for row in table(whole, "transported_weights"):
        key = f"{row['layer']}.{row['projection']}"
        W, W_tilde = (residuals[f"{key}.{name}"].double() for name in ("original_weight", "weight"))
        assert float(row["norm_ratio"]) == pytest.approx(float(W_tilde.norm() / W.norm()))
        assert float(row["strength"]) == 0.1
    for row in table(whole, "selection"):
        index = residuals[f"{row['layer']}.{row['projection']}.index"]
        assert row["selected"] == " ".join(map(str, index.tolist())) and len(index) == 7
    curve = json.loads((whole / "adapted/hot/seed0/loss_curve.json").read_text())
    told = [row for row in table(whole, "loss_curves") if row["training"] == "fused_adapted/seed0"]
    assert [float(row["loss"]) for row in told if row["part"] == "train"] == [p["loss"] for p in curve["train"]]


def test_the_page_is_one_file_that_a_parser_accepts(whole):
    text = (whole / "report.html").read_text("utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    files = {f"report/{path.name}" for path in (whole / "report").iterdir()}
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,")) and a not in files]
    assert not outside and not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) > 20 and all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert len(text) < 3e6
    assert {path.suffix for path in (whole / "report").iterdir()} == {".png", ".svg", ".csv"}


def test_the_default_pair_is_there_without_scripts(whole):
    text = (whole / "report.html").read_text("utf-8")
    picked = text[text.index('id="picked"') : text.index("Strongest matches")]
    assert picked.count("<svg") == 4 and "<canvas" not in picked
    assert ".picker { display: none" in text and text.count("<td>", text.index('id="picked-matches"')) >= 8 * 4


def test_nothing_of_the_machine_is_on_the_page(whole, models, texts):
    text = (whole / "report.html").read_text("utf-8")
    for path in (whole, whole.parent, models["target"].parent, texts.parent):
        assert str(path) not in text
    assert "/tmp/" not in text and texts.name in text


def test_paths_and_tokens_are_taken_out_of_texts():
    assert without_paths("no /home/a/b/plans; see ~/x/y and someone/big") == "no plans; see y and someone/big"
    assert without_paths("https://a.b/c/d hf_abcdefghijk 3/4/5") == "https://a.b/c/d hf_(token) 3/4/5"
    assert without_paths("['/a/b.txt', '/c/d.txt']") == "['b.txt', 'd.txt']"
    assert without_paths("file:///a/b/c.html, file:/a/b/c, '/a b/c d/e.txt' a/b") == "c.html, c, 'e.txt' a/b"


def test_the_home_folder_and_its_owner_are_taken_out_even_with_spaces(monkeypatch):
    for name, folder in {
        "HOME": "/home/Ann Lee",
        "MODELS_ROOT": "/big disk/m",
        "TRANSPORT_RESULTS_ROOT": "/r s",
    }.items():
        monkeypatch.setenv(name, folder)
    monkeypatch.setenv("LOGNAME", "annlee")
    told = without_paths("at:/home/Ann Lee/x y; /big disk/m/org/name is by annlee in /r s/demo/z, not annlees")
    assert told == "at:x y; name is by (user) in z, not annlees"
    line = {"command": ["/a b/evaluation/report.py", "/other disk/my run/demo", "--run-dir=/o d/r"]}
    assert command_of(line) == "python evaluation/report.py demo --run-dir=r"


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


def test_an_unfinished_run_is_shown_from_its_first_stage_on(run):
    for part in ("fused", "adapted"):
        shutil.rmtree(run / part)
    (run / "results.json").unlink()
    text = page_of(run)
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
    evil = "<script>alert(1)</script>\"'&"
    for name in ("fused/manifest.json", "samples.json", "results.json"):
        record = json.loads((run / name).read_text())
        if "lineage" in record:
            record["lineage"]["models"]["source"] |= {"name": evil, "licence": {"license": evil}}
        if "prompts" in record:
            record["prompts"][0] = record["texts"]["fused"]["continuations"][0] = evil
        if "arms" in record:
            record["arms"] = {("no_hot" if arm == evil else arm): found for arm, found in record["arms"].items()}
            record["arms"][evil] = record["arms"]["self"]
        (run / name).write_text(json.dumps(record))
    text = page_of(run)
    page = Page(text)
    assert evil in page.words or any(evil in words for words in page.words)
    assert "<script>alert" not in text and "alert(1)" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the picker and its data


def test_a_folder_of_runs_gets_a_page_that_lists_them(run, capsys):
    other = shutil.copytree(run, run.with_name("other <b>"))
    (other / "results.json").unlink()
    (other / "report.html").unlink()
    before = (run / "report.html").stat().st_mtime_ns
    run_main(report, run.parent)
    page = Page((run.parent / "report.html").read_text("utf-8"))
    assert {"small", "other <b>"} <= set(page.words) and "other%20%3Cb%3E/report.html" in page.addresses
    assert any("No verdict yet" in words for words in page.words)
    assert (other / "report.html").is_file() and str(run.parent / "report.html") in capsys.readouterr().out
    assert (run / "report.html").stat().st_mtime_ns == before  # it was current
    (run / "results.json").touch()
    run_main(report, run.parent)
    assert (run / "report.html").stat().st_mtime_ns > before


def test_runs_that_differ_in_strength_alone_are_compared(run):
    other = shutil.copytree(run, run.with_name("stronger"))
    path = other / "fused/manifest.json"
    path.write_text(path.read_text().replace('"alpha": 0.1', '"alpha": 0.2'))
    page_of(run)
    rows = table(run, "by_strength")
    assert {(row["run"], row["alpha"]) for row in rows} == {("small", "0.1"), ("stronger", "0.2")}
    assert not (run / "report/by_source.csv").exists()


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
    for flags in ([run], ["--run-dir", run]):
        run_main(report, *flags, "--dry-run")
        assert f"would write {run}/report.html" in capsys.readouterr().out and not (run / "report.html").exists()
    run_main(report, "--run-dir", tmp_path / "none", "--dry-run")  # no stage has run yet
    assert f"{tmp_path}/none does not exist yet" in capsys.readouterr().out


def test_help_waits_for_no_drawing():
    code = "import sys\ntry: sys.argv[1:] = ['--help']; from evaluation.report import main; main(['--help'])\nfinally: "
    found = subprocess.run([sys.executable, "-c", code + "print('matplotlib' in sys.modules)"], cwd=ROOT, **CAPTURED)
    assert found.stdout.splitlines()[-1] == "False", found.stderr


def test_what_is_no_run_is_refused(fails, tmp_path):
    assert "does not exist" in fails(report, tmp_path / "none")
    assert "is no run: it has none of plans" in fails(report, tmp_path)


def test_samples_are_the_greedy_texts_of_stock_transformers(whole, models):
    samples = json.loads((whole / "samples.json").read_text())
    assert list(samples["texts"]) == ["base", "fused", "fused_adapted", "source"] and len(samples["prompts"]) == 3
    folders = {"base": models["target"], "fused": whole / "fused", "source": models["source"]}
    for name, folder in folders.items():
        checkpoint = open_checkpoint(str(folder))
        model, tokenizer = checkpoint.load_model("float32"), checkpoint.load_tokenizer()
        ids = torch.tensor([tokenizer(samples["prompts"][0])["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert samples["texts"][name]["continuations"][0] == expected


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_overlaps_and_nothing_is_wider_than_the_window(whole, width, dark):
    found = ask(whole / "report.html", LAYOUT, width, dark)
    assert found["width"] == width and found["needed"] <= width and not found["overlaps"]
    assert (found["ground"] == "rgb(255, 255, 255)") is not dark


@needs_browser
def test_a_reader_can_pick_side_and_layer(whole):
    found = ask(whole / "report.html", PICK)
    assert (found["side"], found["layer"], found["canvases"], len(found["rows"])) == ("o_in", "2", 4, 8)
    source_layer = int(load_file(whole / "plans/plans/o_in.safetensors")["P"][2].argmax())
    assert found["said"] == f"o_in, target layer 2, source layer {source_layer}"
    Q, R = dense_plan(whole, "o_in", 2, source_layer)
    i, j = np.unravel_index(Q.argmax(), Q.shape)
    assert found["rows"][0] == [str(i), str(j), f"{R[i, j]:.3f}", f"{100 * Q[i, j] * len(Q):.1f} %"]


@needs_browser
def test_the_page_can_be_printed(whole, tmp_path):
    chromium(f"--print-to-pdf={tmp_path}/report.pdf", (whole / "report.html").as_uri())
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
