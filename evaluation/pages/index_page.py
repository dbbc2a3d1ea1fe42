"""The page for a folder that holds several runs: the verdict of each, and links to their reports."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from core.errors import first_line
from core.files import MANIFEST, write_text
from core.progress import Progress
from core.runs.usage import USAGE
from evaluation.arms.run import RESULTS
from evaluation.arms.samples import SAMPLES
from evaluation.figures import benchmarks
from evaluation.figures.figure import remove_others
from evaluation.figures.sensitivity import BY_SOURCE, BY_STRENGTH
from evaluation.pages.benchmark_scores import benchmark_sets
from evaluation.pages.report_page import FIGURES, REPORT, Section, comparisons, described, environment, write_report
from evaluation.pages.run_files import UNREADABLE, RunFiles, is_run
from evaluation.pages.verdict import headline
from evaluation.significance import interval

log = logging.getLogger(__name__)
INDEX_ARMS = ("fused", "no_hot", "fused_adapted")
# The files that say when a run has changed, and those of its figures, which are written before the page.
CHANGING = (
    RESULTS,
    SAMPLES,
    USAGE,
    f"*/{MANIFEST}",
    f"adapted/*/*/{MANIFEST}",
    "benchmarks/*/*/*.json",
    f"{FIGURES}/*.csv",
)


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, by name."""
    return [run for run in sorted(folder.glob("*/")) if is_run(run)]


def write_index(folder: Path) -> Path:
    """Write the report of every run that has changed since its report, and the page that lists all runs.

    A run that cannot be read is listed with the reason, so that it does not hide the others.

    Returns:
        The path of the page.
    """
    rows = []
    sets: dict[str, dict[str, Any]] = {}
    for run in Progress(runs_in(folder), desc="reports", unit="runs"):
        try:
            if not is_current(run):
                write_report(run)
            files = RunFiles.read(run)
            rows.append({"run": run.name, "verdict": headline(files.results), "diffs": diffs_of(files), "link": True})
            for kind, found in benchmark_sets(run).items():
                sets[f"{run.name}, general" if kind == "general" else run.name] = found
        except UNREADABLE as error:
            log.warning("%s: %s", run.name, error)
            rows.append({"run": run.name, "verdict": first_line(error), "diffs": [""] * len(INDEX_ARMS), "link": False})
    scale = benchmarks.common_scale(sets)
    if scale is not None:
        scale.save(folder / FIGURES)
    section = described(Section("scale", "Normalised comparison", [scale] if scale else []))
    template = environment().get_template("index.html.jinja")
    text = template.render(rows=rows, arms=INDEX_ARMS, report=REPORT, section=section, figures_folder=FIGURES)
    write_text(folder / REPORT, text)
    remove_others(folder / FIGURES, [scale.name] if scale else [])
    return folder / REPORT


def is_current(run: Path) -> bool:
    """Whether a run has a report that is newer than all that it shows of the run, and shows the runs beside it as they
    are now."""
    report = run / REPORT
    changed = [path.stat().st_mtime_ns for pattern in CHANGING for path in run.glob(pattern)]
    if not report.is_file() or report.stat().st_mtime_ns < max(changed, default=0):
        return False
    return compared_now(run) == compared_before(run)


def compared_now(run: Path) -> dict[str, str] | None:
    """The comparisons with other runs that a report would have now, figure -> its numbers; None where one cannot be
    made, which the report says in its own words."""
    try:
        return {figure.name: figure.csv() for figure in comparisons(RunFiles.read(run))}
    except UNREADABLE:
        return None


def compared_before(run: Path) -> dict[str, str]:
    """The same of the report that is there."""
    files = {name: run / FIGURES / f"{name}.csv" for name in (BY_STRENGTH, BY_SOURCE)}
    return {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}


def diffs_of(files: RunFiles) -> list[str]:
    """The differences to base of the arms of the index, as text."""
    arms = files.results["arms"] if files.results else {}
    return [interval(arms[arm]) if arm in arms else "" for arm in INDEX_ARMS]
