"""The report of a finished pico run: its files against the run's own, the page in a parser and in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import LAYOUT, PICK, ask, chromium, needs_browser, violations, without_scripts
from conftest import ROOT
from report_pages import Page, table
from safetensors.torch import load_file

from core.models.checkpoints import open_checkpoint
from evaluation.pages.facts import command_of, settings_table
from evaluation.pages.paths import without_paths
from evaluation.pages.run_files import RunFiles, config_of
from evaluation.pages.verdict import further_sentences, headline


def test_layer_plans_in_the_file_are_those_of_stage_1(reported):
    rows = table(reported, "layer_plans")
    for side in ("q", "k", "v", "o", "attn_in", "o_in"):
        tensors = load_file(reported / f"plans/plans/{side}.safetensors")
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


def test_neuron_matches_and_masses_are_those_of_the_plans(reported):
    matches = table(reported, "neuron_plan")
    side, layer, source_layer = (matches[0][key] for key in ("side", "target_layer", "source_layer"))
    Q, R = dense_plan(reported, side, int(layer), int(source_layer))
    assert len(matches) == 8
    for match in matches:
        i, j = int(match["target_neuron"]), int(match["source_neuron"])
        assert float(match["correlation"]) == pytest.approx(R[i, j], abs=1e-5)
        assert float(match["share"]) == pytest.approx(Q[i, j] * len(Q), rel=1e-4)
    first = matches[0]
    assert (int(first["target_neuron"]), int(first["source_neuron"])) == np.unravel_index(Q.argmax(), Q.shape)

    curves = table(reported, "top_k_mass")
    told = {float(row["share_of_entries"]): float(row["mass"]) for row in curves if row["side"] == "k"}
    P = load_file(reported / "plans/plans/k.safetensors")["P"]
    at_tenth = min(told, key=lambda share: abs(share - 0.1))
    found = []
    for target_layer in range(len(P)):
        largest = np.sort(dense_plan(reported, "k", target_layer, int(P[target_layer].argmax()))[0].ravel())[::-1]
        mass = np.concatenate([[0], largest.cumsum() / largest.sum()])
        found.append(np.interp(at_tenth * len(largest), np.arange(len(mass)), mass))
    assert told[at_tenth] == pytest.approx(np.mean(found), abs=5e-3)


def test_losses_weights_and_curves_are_those_of_the_stages(reported):
    results = json.loads((reported / "results.json").read_text())
    for row in table(reported, "losses"):
        assert float(row["diff"]) == results["arms"][row["arm"]]["diff"]
        assert float(row["nll"]) == results["arms"][row["arm"]]["nll"]
    residuals = load_file(reported / "fused/hot_residual.safetensors")
    for row in table(reported, "transported_weights"):
        key = f"{row['layer']}.{row['projection']}"
        W, W_tilde = (residuals[f"{key}.{name}"].double() for name in ("original_weight", "weight"))
        assert float(row["norm_ratio"]) == pytest.approx(float(W_tilde.norm() / W.norm()))
        assert float(row["strength"]) == 0.1
    for row in table(reported, "selection"):
        index = residuals[f"{row['layer']}.{row['projection']}.index"]
        assert row["selected"] == " ".join(map(str, index.tolist())) and len(index) == 7
    curve = json.loads((reported / "adapted/hot/seed0/loss_curve.json").read_text())
    told = [row for row in table(reported, "loss_curves") if row["training"] == "fused_adapted/seed0"]
    assert [float(row["loss"]) for row in told if row["part"] == "train"] == [p["loss"] for p in curve["train"]]


def test_samples_are_the_greedy_texts_of_stock_transformers(reported, models):
    samples = json.loads((reported / "samples.json").read_text())
    assert list(samples["texts"]) == ["base", "fused", "fused_adapted", "source"] and len(samples["prompts"]) == 3
    folders = {"base": models["target"], "fused": reported / "fused", "source": models["source"]}
    for name, folder in folders.items():
        checkpoint = open_checkpoint(str(folder))
        model, tokenizer = checkpoint.load_model("float32"), checkpoint.load_tokenizer()
        ids = torch.tensor([tokenizer(samples["prompts"][0])["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert samples["texts"][name]["continuations"][0] == expected


def test_the_page_is_one_file_that_a_parser_accepts(reported):
    text = (reported / "report.html").read_text("utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    files = {f"report/{path.name}" for path in (reported / "report").iterdir()}
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,")) and a not in files]
    assert not outside and not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) > 20 and all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert len(text) < 3e6
    assert {path.suffix for path in (reported / "report").iterdir()} == {".png", ".svg", ".csv"}


def test_the_tables_sentences_stand_below_the_figure_and_above_the_arms(reported):
    files = RunFiles.read(reported)
    words = Page((reported / "report.html").read_text("utf-8")).words
    told = [words.index(sentence) for sentence in further_sentences(files.results, files.trials)]
    figure = next(number for number, text in enumerate(words) if text.startswith("Loss of every arm minus"))
    assert told and told == sorted(told) and figure < told[0] and told[-1] < words.index("All arms")
    assert words.index(headline(files.results)) < figure


def test_the_default_pair_is_there_without_scripts(reported):
    text = (reported / "report.html").read_text("utf-8")
    picked = text[text.index('id="picked"') : text.index("Strongest matches")]
    assert picked.count("<svg") == 4 and "<canvas" not in picked
    assert ".picker { display: none" in text and text.count("<td>", text.index('id="picked-matches"')) >= 8 * 4


def test_nothing_of_the_machine_is_on_the_page(reported, models, texts):
    text = (reported / "report.html").read_text("utf-8")
    for path in (reported, reported.parent, models["target"].parent, texts.parent):
        assert str(path) not in text
    assert "/tmp/" not in text and texts.name in text


def test_only_settings_that_differ_are_listed(reported):
    """YAML has lists where the defaults have tuples, and a default may be nothing."""
    _, *rows = settings_table(RunFiles.read(reported))
    values = {name: (value, default) for name, value, default in rows}
    assert values["top_k"] == ("7", "128") and values["data_file"] == ("texts.jsonl", "")
    assert "alpha_search" not in values and all(value != default for value, default in values.values())


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
    assert command_of(line, Path("demo")) == "python evaluation/report.py demo --run-dir=r"


def test_commands_are_shown_as_the_repository_takes_them_again(monkeypatch, tmp_path):
    """Of the scripts' ones, run_pipeline.sh makes paths absolute, and run_train_final.sh hands over a file that it
    removes; the copy in the run is told where it lies."""
    run = tmp_path / "results/two words"
    run.mkdir(parents=True)

    def told(*arguments):
        return command_of({"command": ["run_activs_and_hot.py", *map(str, arguments)]}, run)

    yours = "scripts/experiments/yours.yaml"
    assert told("--config", ROOT / yours, "--quick") == f"python run_activs_and_hot.py --config {yours} --quick"
    assert told(f"--hot-dir={ROOT}/runs/a b/plans") == "python run_activs_and_hot.py --hot-dir='runs/a b/plans'"
    gone = f"{tmp_path}/work/two words/experiment.yaml"
    assert told("--config", gone) == "python run_activs_and_hot.py --config experiment.yaml"
    (run / "experiment.yaml").write_text("task: malay\n")
    for config in (told("--config", gone).partition(".py ")[2], config_of(run)):
        assert config == "--config RUN/experiment.yaml"
    monkeypatch.setenv("TRANSPORT_RESULTS_ROOT", str(run.parent))
    for config in (told("--config", gone).partition(".py ")[2], config_of(run)):
        assert config == "--config \"$TRANSPORT_RESULTS_ROOT\"/'two words/experiment.yaml'"


def test_help_waits_for_no_drawing():
    code = "import sys\ntry: sys.argv[1:] = ['--help']; from evaluation.report import main; main(['--help'])\nfinally: "
    command = [sys.executable, "-c", code + "print('matplotlib' in sys.modules)"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False", found.stderr


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_overlaps_and_nothing_is_wider_than_the_window(reported, width, dark):
    found = ask(reported / "report.html", LAYOUT, width, dark)
    assert found["width"] == width and found["needed"] <= width and not found["overlaps"]
    assert found["smallest"] > 8 and found["contrast"] > 4.5
    assert (found["ground"] == "rgb(255, 255, 255)") is not dark


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_to_object_to(reported, width, dark):
    assert violations(reported / "report.html", width, dark) == []


@needs_browser
def test_a_browser_without_javascript_shows_the_default_pair(reported):
    found = without_scripts(reported / "report.html")
    picked = found["html"][found["html"].index('id="picked"') : found["html"].index("Strongest matches")]
    assert picked.count("<svg") == 4 and "<canvas" not in picked and found["picker"] == "none"


@needs_browser
def test_a_reader_can_pick_side_and_layer(reported):
    found = ask(reported / "report.html", PICK)
    assert (found["side"], found["layer"], found["canvases"], len(found["rows"])) == ("o_in", "2", 4, 8)
    source_layer = int(load_file(reported / "plans/plans/o_in.safetensors")["P"][2].argmax())
    assert found["said"] == f"o_in, target layer 2, source layer {source_layer}"
    Q, R = dense_plan(reported, "o_in", 2, source_layer)
    i, j = np.unravel_index(Q.argmax(), Q.shape)
    assert found["rows"][0] == [str(i), str(j), f"{R[i, j]:.3f}", f"{100 * Q[i, j] * len(Q):.1f} %"]


@needs_browser
def test_the_print_has_every_heading_table_and_drawing_of_the_page(reported, tmp_path):
    """The PDF that Chromium prints says of each element what it is, for readers who do not see it."""
    chromium(f"--print-to-pdf={tmp_path}/report.pdf", (reported / "report.html").as_uri())
    printed = re.findall(rb"/S /(\w+)", (tmp_path / "report.pdf").read_bytes())
    tags = [tag for tag, _ in Page((reported / "report.html").read_text("utf-8")).tags]
    for kind, tag in {b"H1": "h1", b"H2": "h2", b"H3": "h3", b"H4": "h4", b"Table": "table"}.items():
        assert printed.count(kind) == tags.count(tag) > 0, tag
    assert printed.count(b"Figure") == tags.count("figure") + tags.count("svg") > 20
