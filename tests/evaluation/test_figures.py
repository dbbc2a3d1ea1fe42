"""The figures of the report on data that is known: their tables, their drawings, their colours."""

import csv
import io
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from core.fusion.controls import CONTROLS
from evaluation.arms.control_residuals import FUSED_LEARNED
from evaluation.arms.run import TRAINED
from evaluation.arms.verdict import statistics
from evaluation.figures import (
    benchmarks,
    forest,
    layer_plans,
    mass,
    neuron_plans,
    pairs,
    sensitivity,
    theme,
    transported,
)
from evaluation.figures.figure import Figure, Panel, inline_svg
from evaluation.significance import normalised
from evaluation.tables import rows


def lines_of(figure):
    """The CSV of a figure as dictionaries of texts."""
    return list(csv.DictReader(io.StringIO(figure.csv())))


def test_the_forest_has_every_arm_with_its_difference_interval_and_seeds():
    rng = np.random.default_rng(0)
    losses = {arm: (10 + rng.normal(size=6)).tolist() for arm in ("base", *CONTROLS, "fused", "no_hot/0", "no_hot/1")}
    losses |= {f"fused_adapted/{seed}": (9 + rng.normal(size=6)).tolist() for seed in (0, 1)}
    arms = statistics(losses, [5] * 6, range(6))
    lines = {line["arm"]: line for line in lines_of(forest.losses(arms))}
    assert list(lines) == ["base", *CONTROLS, "fused", "no_hot", "fused_adapted"]
    base = np.array(losses["base"])
    by_seed = [(np.array(losses[f"fused_adapted/{seed}"]) - base).sum() / 30 for seed in (0, 1)]
    assert float(lines["fused_adapted"]["diff"]) == pytest.approx(np.mean(by_seed))
    assert [float(x) for x in lines["fused_adapted"]["seeds"].split()] == pytest.approx(by_seed)
    assert (float(lines["fused"]["low"]), float(lines["fused"]["high"])) == tuple(arms["fused"]["ci95"])
    assert lines["base"]["low"] == "" and float(lines["base"]["diff"]) == 0
    kinds = {arm: line["kind"] for arm, line in lines.items()}
    assert kinds["fused"] == "fused" and kinds["no_hot"] == "trained" and kinds["self"] == "control"


def test_bits_per_byte_have_the_source_as_a_line():
    arms = {
        "base": {"bits_per_byte": 1.5, "diff": 0.0, "ci95": [0.0, 0.0]},
        "fused": {"bits_per_byte": 1.4, "diff": -0.1, "ci95": [-0.2, -0.05]},
        "source": {"bits_per_byte": 1.0, "diff": -0.5, "ci95": None},
    }
    lines = lines_of(forest.bits(arms))
    assert [(line["arm"], line["bits_per_byte"], line["low"]) for line in lines] == [
        ("base", "1.5", ""),
        ("fused", "1.4", "-0.2"),
        ("source", "1.0", ""),
    ]


def test_the_source_and_every_training_have_a_look_of_their_own():
    """As in the figures that tell arms apart by colour (`theme.series_of`)."""
    arms = ("base", "fused", FUSED_LEARNED, *TRAINED, "source", "self")
    looks = {arm: forest.look_of(arm, forest.kind_of(arm)) for arm in arms}
    assert len(set(looks.values())) == len(looks) and looks["source"] == (theme.colour("gold"), "v")
    for arm in TRAINED:
        series = theme.series_of(arm)
        assert looks[arm] == (series["color"], series["marker"])


def test_learned_strengths_are_no_arm_of_another_kind_and_the_caption_says_what_they_are():
    found = {"nll": 3.0, "diff": -0.1, "ci95": [-0.2, -0.05]}
    without, with_it = (forest.losses(dict.fromkeys(arms, found)) for arms in (("base",), ("base", FUSED_LEARNED)))
    assert lines_of(with_it)[1]["kind"] == "learned"
    assert FUSED_LEARNED in with_it.caption and FUSED_LEARNED not in without.caption


def test_a_bad_plan_is_bad_and_the_rank_correlation_is_that_of_the_path():
    P = torch.eye(8).double() / 8
    assert layer_plans.depth_correlation(P) == pytest.approx(1.0)
    assert layer_plans.depth_correlation(P.flip(0)) == pytest.approx(-1.0)
    assert layer_plans.depth_correlation(torch.ones(3, 4)) is None
    bad = layer_plans.bad_plan(P)
    assert abs(layer_plans.depth_correlation(bad)) < 0.2
    torch.testing.assert_close(bad.sort(1).values, P.sort(1).values)


def test_marks_on_a_heat_map_have_the_same_colours_on_a_dark_page():
    """As the map itself; every other colour of a drawing is a variable of the page."""
    text = inline_svg(Panel(lambda axes: layer_plans.draw(axes, torch.eye(3), "P", [0, 1, 2]), "a plan"), "x")
    assert f"fill: {theme.MARK}; stroke: {theme.MARK_EDGE}" in text and "fill: var(--ink)" in text


def test_the_table_of_a_layer_plan_has_every_cell():
    P, cost = torch.tensor([[0.1, 0.4], [0.3, 0.2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert layer_plans.table("q", P, cost)[1] == ("q", 0, 1, pytest.approx(0.4), 2.0, 1)
    assert [(row[1], row[2]) for row in layer_plans.table("q", P, cost) if row[-1]] == [(0, 1), (1, 0)]


def test_the_mass_of_the_largest_entries():
    Q = torch.tensor([[0.4, 0.1], [0.3, 0.2]])
    assert pairs.mass_curve(Q) == [(1, pytest.approx(0.4)), (2, pytest.approx(0.7)), (3, pytest.approx(0.9)), (4, 1.0)]
    Q = torch.rand(30, 20, generator=torch.Generator().manual_seed(0))
    largest = np.sort(Q.numpy().ravel().astype(float))[::-1]
    for k, share in pairs.mass_curve(Q):
        assert share == pytest.approx(largest[:k].sum() / largest.sum())


def test_masses_are_averaged_over_layers_and_then_over_sides():
    def pair(side, masses):
        curve = [(k, mass) for k, mass in enumerate(masses, 1)]
        return pairs.Pair(side, 0, 0, (2, 2), torch.ones(2, 2), [], curve)

    found = mass.by_side([pair("q", (0.4, 0.6, 0.8, 1)), pair("q", (0.6, 0.8, 1, 1)), pair("k", (0.25, 0.5, 0.75, 1))])
    at = {share: number for number, share in enumerate(mass.SHARES)}
    assert found["q"][at[1.0]] == pytest.approx(1)
    quarter = np.interp(0.25, mass.SHARES, found["q"])
    assert quarter == pytest.approx(0.5, abs=0.02)  # between the shares at which the curve is told
    np.testing.assert_allclose(found["k"], mass.SHARES, atol=1e-12)  # the uniform plan
    np.testing.assert_allclose(found["average"], (found["q"] + found["k"]) / 2)


def test_the_strongest_matches_name_no_neuron_twice():
    Q = torch.tensor([[9.0, 8.0, 1.0], [7.0, 2.0, 3.0], [4.0, 6.0, 5.0]])
    assert pairs.strongest(Q, 2) == [(0, 0), (2, 1)] and pairs.strongest(Q, 9) == [(0, 0), (2, 1), (1, 2)]


@pytest.mark.parametrize("size", [12, 90])  # the exact decomposition, and power iterations
def test_co_clustering_finds_blocks_that_were_shuffled(size):
    generator = torch.Generator().manual_seed(1)
    half = size // 2
    blocks = torch.full((size, size + 4), 0.1)
    blocks[:half, : half + 2] = blocks[half:, half + 2 :] = 1.0
    noisy = blocks * (1 + 0.05 * torch.rand(blocks.shape, generator=generator))
    rows, columns = torch.randperm(size, generator=generator), torch.randperm(size + 4, generator=generator)
    ordered_rows, ordered_columns = pairs.co_clustered(noisy[rows][:, columns])
    found = (rows[ordered_rows] < half).int().tolist(), (columns[ordered_columns] < half + 2).int().tolist()
    for order in found:
        assert sum(a != b for a, b in pairwise(order)) == 1, "two blocks, each in one piece"
    assert found[0][0] == found[1][0], "the blocks lie on the diagonal"


def test_blocks_are_densities_relative_to_the_uniform_plan():
    torch.testing.assert_close(pairs.blocks_of(torch.full((50, 90), 1 / 4500)), torch.ones(40, 40))
    Q = torch.rand(50, 90, generator=torch.Generator().manual_seed(2))
    assert float(pairs.blocks_of(Q / Q.sum()).mean()) == pytest.approx(1, abs=0.05)  # blocks overlap by a neuron


LINE = {"selected": 2, "norm_ratio": 0.7, "cosine": 0.5, "explained_variance": None}
REPORT = [
    {"layer": layer, "projection": name, **LINE, "source_layers": {"0": 0.3, "2": 0.7}}
    for layer in (0, 1)
    for name in ("q", "o")
]


@pytest.mark.parametrize("alpha", [0.07, {"0.q": 0.1, "0.o": 0.2, "1.q": 0.3, "1.o": 0.4}])
def test_strengths_are_one_number_or_one_per_projection(alpha):
    lines = lines_of(transported.transported(REPORT, alpha))
    expected = [0.07] * 4 if alpha == 0.07 else [0.1, 0.2, 0.3, 0.4]
    assert [float(line["strength"]) for line in lines] == expected
    assert {line["source_layer"] for line in lines} == {"2"} and lines[0]["explained_variance"] == ""


def test_projections_look_the_same_in_all_panels_and_one_legend_names_them():
    """Also where some figure of a projection was not measured, whose place then is not taken by the next one."""
    lines = [{**one, "explained_variance": None if one["projection"] == "q" else 0.5} for one in REPORT]
    *panels, legend = transported.transported(lines, 0.1).panels
    looks = set()
    for panel in (*panels, legend):
        axes = Canvas().add_subplot()
        panel.draw(axes)
        looks |= {(line.get_label(), line.get_color(), line.get_marker()) for line in axes.lines}
        told = [text.get_text() for text in found.get_texts()] if (found := axes.get_legend()) else []
        assert told == (["q", "o"] if panel is legend else [])
    assert len(looks) == 2


def test_the_caption_counts_the_plans_that_were_not_read():
    read = [pairs.Pair(side, n, 0, (2, 2), torch.ones(2, 2), [], []) for side, n in (("q", 0), ("q", 2), ("k", 0))]
    assert neuron_plans.left_out(read[:2], 2) == ""
    note = neuron_plans.left_out(read, 3)
    assert note.endswith(": q 2 of 3, k 1 of 3 target layers.")
    assert neuron_plans.neuron_plan(read[0], note).caption.endswith(note)


def test_the_selection_by_bin():
    np.testing.assert_allclose(transported.share_by_bin(np.array([0, 1, 95]), 96), [1.0, *[0.0] * 46, 0.5])
    index = {(0, "q"): torch.tensor([1, 3]), (1, "q"): torch.tensor([0, 2])}
    lines = lines_of(transported.selected(index, {"q": 5}))
    assert [(line["layer"], line["neurons"], line["selected"]) for line in lines] == [
        ("0", "5", "1 3"),
        ("1", "5", "0 2"),
    ]


def test_runs_beside_each_other_are_sorted_by_what_differs():
    points = [
        sensitivity.Point("b", "big", 0.1, {"fused": (-0.2, [-0.3, -0.1])}, {"fused": 50.0}),
        sensitivity.Point("a", "Small", 0.05, {"fused": (-0.1, None)}, {}),
    ]
    lines = lines_of(sensitivity.by_strength(points))
    assert [(line["alpha"], line["diff"], line["low"], line["benchmark_mean"]) for line in lines] == [
        ("0.05", "-0.1", "", ""),
        ("0.1", "-0.2", "-0.3", "50.0"),
    ]
    assert [line["source"] for line in lines_of(sensitivity.by_source(points))] == ["Small", "big"]


def scored(**values):
    return {
        arm: {"value": value, "diff": value - 40, "ci95": [-1.0, 2.0], "p_holm": 0.5} for arm, value in values.items()
    }


def test_benchmarks_have_every_score_and_their_mean():
    arms = scored(fused=41.0, fused_adapted=43.0) | {"base": {"value": 40.0}}
    row = {"metric": "acc", "n": 7, "arms": arms}
    found = {"rows": {"one": row, "two": row}, "mean": arms}
    found["normalised"] = normalised({arm: score["value"] for arm, score in arms.items()})
    lines = lines_of(benchmarks.scores("malay", found))
    assert [line["benchmark"] for line in lines] == ["one"] * 3 + ["two"] * 3 + ["mean"] * 3
    assert [(line["arm"], line["value"], line["low"]) for line in lines[:3]] == [
        ("fused", "41.0", "-1.0"),
        ("fused_adapted", "43.0", "-1.0"),
        ("base", "40.0", ""),
    ]
    scale = {line["arm"]: float(line["min_max"]) for line in lines_of(benchmarks.common_scale({"malay": found}))}
    assert scale == {"base": 0.0, "fused": pytest.approx(1 / 3), "fused_adapted": 1.0}
    assert benchmarks.common_scale({"malay": {**found, "normalised": {}}}) is None


def test_every_figure_can_be_drawn_and_its_files_are_the_same_twice(tmp_path):
    row = {"metric": "acc", "n": 7, "arms": scored(fused=41.0) | {"base": {"value": 40.0}}}
    points = [sensitivity.Point(f"{n}", f"s{n}", n / 10, {"fused": (-0.1, None)}, {"fused": 1.0}) for n in (1, 2)]
    figures = [
        benchmarks.scores("general", {"rows": {"one": row}, "mean": {}}),
        sensitivity.by_strength(points),
        sensitivity.by_source(points),
        transported.transported(REPORT, 0.1),
    ]
    for figure in figures:
        found = []
        for folder in (tmp_path / "a", tmp_path / "b"):
            figure.save(folder)
            found.append({path.name: path.read_bytes() for path in sorted(folder.glob(f"{figure.name}.*"))})
        assert found[0] == found[1] and len(found[0]) == 3
        assert len(figure.inline()) == len(figure.panels)


def test_a_drawing_on_the_page_has_its_own_ids_the_pages_colours_and_escaped_words():
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "o", color=theme.colour("blue"), label="<b>&")
        axes.imshow([[0, 1]])
        axes.legend()

    figure = Figure("name", "", "", [Panel(draw, '"<script>" & more')] * 2, (), ())
    first, second = figure.inline()
    assert 'aria-label="&quot;&lt;script&gt;&quot; &amp; more"' in first and "<b>" not in first
    ids = [set(re.findall(r'\bid="([^"]+)"', drawing)) for drawing in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for drawing, known in zip((first, second), ids, strict=True):
        used = re.findall(r'href="#([^"]+)"', drawing) + re.findall(r"url\(#([^)]+)\)", drawing)
        assert used and set(used) <= known
        assert not re.findall(r'(?:src|href)="(?!#|data:image/png)', drawing) and "http" not in drawing.split(">", 1)[0]
    assert "var(--blue)" in first and theme.colour("blue") not in first and "var(--ink)" in first


# Machado, Oliveira and Fernandes (2009), full severity: what linear RGB becomes for the three kinds of dichromats.
DICHROMATS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    "none": np.eye(3).tolist(),
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """The contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb):
    """Ottosson's perceptual space, in which distances are about what eyes see; 0.02 is just visible."""
    to_cone = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_cone.append([0.0883024619, 0.2817188376, 0.6299787005])
    cone = np.cbrt(np.clip(np.array(to_cone) @ rgb, 0, None))
    to_lab = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
    return np.array([*to_lab, [0.0259040371, 0.7827717662, -0.808675766]]) @ cone


@pytest.mark.parametrize("dark", [0, 1])
def test_texts_and_lines_stand_out_from_the_page(dark):
    colours = {name: values[dark] for name, values in theme.COLOURS.items()}
    for ground in ("surface", "panel"):
        assert all(contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "muted", "blue"))  # AA, text
    assert all(contrast(colours[name], colours["surface"]) >= 3 for name in theme.SERIES)  # AA, graphics


@pytest.mark.parametrize("dark", [0, 1])
@pytest.mark.parametrize("eyes", DICHROMATS)
def test_the_first_series_are_told_apart_by_every_kind_of_eyes(eyes, dark):
    """The first four; beyond these the markers, which differ for all series, have to help."""
    projected = [np.array(DICHROMATS[eyes]) @ linear(theme.COLOURS[name][dark]) for name in theme.SERIES[:4]]
    seen = [oklab(np.clip(one, 0, 1)) for one in projected]
    apart = [float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)]
    assert min(apart) > 0.07
    assert len(set(theme.MARKERS)) == len(theme.SERIES)


def test_every_arm_of_the_tables_has_a_look_of_its_own():
    assert set(theme.ARMS) == set(rows.ARMS) and len(theme.ARMS) <= len(theme.SERIES)
    assert len({tuple(theme.series(number).values()) for number in range(2 * len(theme.SERIES))}) == 14
