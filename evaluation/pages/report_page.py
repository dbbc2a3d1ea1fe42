"""The report of one run: its figures, the words around them, and the page that holds both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.errors import first_line
from core.files import write_text
from core.fusion.projections import PROJECTIONS
from core.fusion.residual_file import read_selection
from core.manifest import COMMANDS
from core.progress import Progress
from evaluation.figures import benchmarks, forest
from evaluation.figures.curves import loss_curves
from evaluation.figures.figure import Figure, remove_others
from evaluation.figures.layer_plans import layer_plans
from evaluation.figures.mass import top_k_mass
from evaluation.figures.neuron_plans import default_pair, left_out, neuron_plan, picker_data
from evaluation.figures.pairs import Pair, matched_pairs
from evaluation.figures.sensitivity import by_source, by_strength
from evaluation.figures.theme import PANEL, css_variables
from evaluation.figures.transported import selected, transported
from evaluation.pages import verdict
from evaluation.pages.benchmark_scores import benchmark_sets
from evaluation.pages.facts import facts
from evaluation.pages.paths import without_paths
from evaluation.pages.run_files import UNREADABLE, RunFiles
from evaluation.pages.siblings import siblings

REPORT, FIGURES = "report.html", "report"
HERE = Path(__file__).parent
# Arm -> what the column of its text samples is called.
SAMPLED = ("base", "fused", "fused_adapted", "source")


@dataclass
class Section:
    """A part of the page: its heading, its anchor, its figures, and the plans between which a reader can choose."""

    anchor: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def sections(files: RunFiles) -> Iterator[Section]:
    """All sections, in the order of the page. What cannot be read is named among what the run lacks."""
    for what, make, command in (
        ("the verdict", loss_sections, "evaluation/compare_arms.py"),
        ("figures of the plans", plan_sections, COMMANDS["plans"]),
        ("what was transported", fusion_sections, COMMANDS["fused"]),
        ("comparisons and benchmarks", other_sections, "evaluation/run_task.py"),
    ):
        try:
            yield from make(files)
        except UNREADABLE as error:
            files.lacks(what, first_line(error), command)


def loss_sections(files: RunFiles) -> Iterator[Section]:
    """What stage 4 measured."""
    yield Section("verdict", "Was anything transferred?", list(loss_figures(files)))


def plan_sections(files: RunFiles) -> Iterator[Section]:
    """What stage 1 found."""
    if files.plans is not None:
        yield Section("layers", "Which layers correspond?", [layer_plans(files.plans)])
        pairs = list(matched_pairs(files.plans))
        shown = neuron_plan(default_pair(pairs), left_out(pairs, files.plans.shape[0]))
        yield Section("neurons", "Which neurons correspond?", [shown], pairs)
        yield Section("mass", "How concentrated are the plans?", [top_k_mass(pairs)])


def fusion_sections(files: RunFiles) -> Iterator[Section]:
    """What stage 2 fused."""
    if files.fused is not None and files.report:
        yield Section("transported", "What was transported?", list(fusion_figures(files)))


def other_sections(files: RunFiles) -> Iterator[Section]:
    """Other runs, benchmarks and trainings."""
    compared = comparisons(files)
    sets = {kind: found for kind, found in benchmark_sets(files.folder).items() if found["rows"]}
    scored = [benchmarks.scores(kind, found) for kind, found in sets.items()]
    scale = benchmarks.common_scale(sets)
    yield Section("runs", "Compared with other runs", compared)
    yield Section("benchmarks", "Benchmarks", [*scored, *([scale] if scale else [])])
    yield Section("training", "How the trainings went", [loss_curves(files.curves)] if files.curves else [])


def comparisons(files: RunFiles) -> list[Figure]:
    """The figures that compare a run with the runs beside it, as far as there are any to compare."""
    strengths, sources = siblings(files)
    compared = [by_strength(strengths)] if strengths else []
    return [*compared, *([by_source(sources)] if sources else [])]


def loss_figures(files: RunFiles) -> Iterator[Figure]:
    """The forest plots of a run."""
    if files.results is None:
        return
    found = files.results
    yield forest.losses(found["arms"])
    if bits := found["held_out"].get("bits_per_byte", {}).get("arms"):
        yield forest.bits(bits)
    if general := found.get("arms_general"):
        yield forest.general_losses(general)


def fusion_figures(files: RunFiles) -> Iterator[Figure]:
    """What stage 2 did, and which neurons it selected where these are not all."""
    index, alpha = read_selection(files.residual_file)
    lines = files.report["projections"]
    yield transported(lines, alpha)
    if files.plans is None:
        return
    sizes = {}
    for name in dict.fromkeys(line["projection"] for line in lines):
        sizes[name] = len(files.plans.strongest(PROJECTIONS[name].selected_side, 0))
    part = {name: size for name, size in sizes.items() if len(index[0, name]) < size}
    if part:
        yield selected(index, part)


def write_report(folder: Path) -> Path:
    """Write a run's report, and its figures as files beside it, in place of those of an earlier report.

    Returns:
        The path of the page.
    Raises:
        UserError: the folder is no run, or something in it cannot be read.
    """
    files = RunFiles.read(folder)
    shown = [section for section in sections(files) if section.figures]
    figures = [figure for section in shown for figure in section.figures]
    for figure in Progress(figures, desc=f"figures of {folder.resolve().name}", unit="figures"):
        figure.save(folder / FIGURES)
    write_text(folder / REPORT, page(files, shown))
    remove_others(folder / FIGURES, [figure.name for section in shown for figure in section.figures])
    return folder / REPORT


def page(files: RunFiles, shown: list[Section]) -> str:
    """The page as HTML."""
    pairs = [pair for section in shown for pair in section.pairs]
    name = files.folder.resolve().name
    models = ", ".join(f"{role} {model['name']}" for role, model in files.models.items())
    found = files.results
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=name,
            models=models,
            headline=verdict.headline(found),
            shown_transfer=verdict.headline(found).startswith("Transfer"),
            amount=verdict.amount(found) if found else None,
            rests_on=verdict.rests_on(found["held_out"]) if found else None,
            sentences=verdict.further_sentences(found, files.trials) if found else [],
            arms=verdict.arm_rows(found) if found else [],
            sections=[described(section) for section in Progress(shown, desc="the page", unit="sections")],
            picker=script_json(picker_data(pairs)) if pairs else None,
            default=default_pair(pairs) if pairs else None,
            samples=files.samples,
            sampled=[arm for arm in SAMPLED if arm in files.samples.get("texts", {})],
            missing=files.missing,
            facts=facts(files),
            figures_folder=FIGURES,
        )
    )


def described(section: Section) -> dict[str, Any]:
    """A section as the template takes it, with its drawings."""
    figures = [
        {
            "name": figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "panels": [Markup(drawing) for drawing in figure.inline()],
            "kind": kind_of(figure),
        }
        for figure in section.figures
    ]
    return {"anchor": section.anchor, "title": section.title, "figures": figures, "picks": bool(section.pairs)}


def kind_of(figure: Figure) -> str:
    """How panels flow on the page: `wide` ones one below the other, others in three columns, small ones in four."""
    width = figure.panels[0].size[0]
    return "wide" if width > PANEL[0] else "small" if width < PANEL[0] else ""


def environment() -> Environment:
    """Jinja with the templates of this folder, in which every text is escaped and an unknown name is an error."""
    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {
        "light": Markup(css_variables(dark=False)),
        "dark": Markup(css_variables(dark=True)),
        "css": Markup((HERE / "report.css").read_text("utf-8")),
        "picker_script": Markup((HERE / "picker.js").read_text("utf-8")),
    }
    found.filters["without_paths"] = without_paths
    return found


def script_json(value: Mapping[str, Any]) -> Markup:
    """JSON that may stand in a `<script>` element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
