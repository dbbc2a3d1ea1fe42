"""A figure of the report: panels, the sentences around them, and its numbers; on the page and as files beside it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from core.files import atomic_file, write_text
from evaluation.figures.theme import COLOURS, PANEL, colour, style

# Width of a figure's file in inches, which says how many panels stand beside each other.
FILE_WIDTH = 12.0
PNG_DPI = 90
# Space around the axes of a small panel in inches: left, bottom, right, top.
MARGINS = (0.5, 0.42, 0.1, 0.28)
# The endings of a figure's files.
ENDINGS = ("png", "svg", "csv")


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        draw: draws it into axes.
        alt: what it shows, in words, for readers who do not see it.
        size: width and height in inches.
        measured: whether matplotlib measures all labels to leave room for them, which names of arms and legends outside
            the axes need, and which takes several times as long as drawing with `MARGINS`.
    """

    draw: Callable[[Axes], object]
    alt: str
    size: tuple[float, float] = PANEL
    measured: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: of its files, without an ending.
        title: in a few words.
        caption: what to see, and what a bad one looks like.
        panels: all of one size.
        columns, rows: its numbers as a table, the head and the lines.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def inline(self) -> list[str]:
        """Every panel as SVG for the page."""
        return [inline_svg(panel, f"{self.name}-{number}") for number, panel in enumerate(self.panels)]

    def save(self, folder: Path) -> None:
        """Write NAME.png, NAME.svg and NAME.csv into `folder`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(style()):
            canvas = drawing(self.panels)
            for kind, options in (("png", {"dpi": PNG_DPI}), ("svg", {"metadata": {"Date": None}})):
                with atomic_file(folder / f"{self.name}.{kind}") as temporary:
                    canvas.savefig(temporary, format=kind, facecolor=colour("surface"), **options)
        write_text(folder / f"{self.name}.csv", self.csv())

    def csv(self) -> str:
        """The numbers as CSV, each with all digits that it has."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()


def remove_others(folder: Path, kept: Collection[str]) -> None:
    """Remove the files of figures that an earlier report left in `folder`; files that are no figure's stay.

    Args:
        kept: names of the figures that the report has now.
    """
    for path in folder.glob("*.csv"):
        files = [path.with_name(f"{path.stem}.{ending}") for ending in ENDINGS]
        if path.stem not in kept and all(file.is_file() for file in files):
            for file in files:
                file.unlink()


def drawing(panels: Sequence[Panel]) -> Canvas:
    """Panels of one size in a grid that is at most `FILE_WIDTH` wide."""
    (width, height), measured = panels[0].size, panels[0].measured
    columns = min(int(FILE_WIDTH / width), len(panels))
    lines = math.ceil(len(panels) / columns)
    canvas = Canvas(figsize=(columns * width, lines * height), layout="constrained" if measured else None)
    FigureCanvasAgg(canvas)
    left, bottom, right, top = MARGINS
    for number, panel in enumerate(panels):
        line, column = divmod(number, columns)
        if measured:
            panel.draw(canvas.add_subplot(lines, columns, number + 1))
        else:
            x, y = (column + left / width) / columns, (lines - 1 - line + bottom / height) / lines
            inside = (1 - (left + right) / width) / columns, (1 - (bottom + top) / height) / lines
            panel.draw(canvas.add_axes((x, y, *inside)))
    return canvas


def whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers alone."""
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def inline_svg(panel: Panel, name: str) -> str:
    """A panel as an `<svg>` element for an HTML page.

    Its colours are the page's CSS variables, its width is the page's, and its ids begin with `name`, so that no two
    drawings of a page share one.
    """
    with matplotlib.rc_context(style()):
        buffer = io.StringIO()
        drawing([panel]).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None
    alt = escape(panel.alt, {'"': "&quot;"})
    head = f'<svg {view[0]} role="img" aria-label="{alt}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("xlink:href", "href").replace("url(#", f"url(#{name}-")
    for variable, (light, _) in COLOURS.items():
        text = text.replace(f": {light}", f": var(--{variable})")
    return text.strip()
