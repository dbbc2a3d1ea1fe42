"""A figure of the report: panels, the sentences around them, and its numbers; on the page and as files beside it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from core.files import atomic_file, write_text
from evaluation.figures.theme import COLOURS, PANEL, colour, style

# Panels beside each other in the file of a figure.
COLUMNS = 3
PNG_DPI = 110


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        draw: draws it into axes.
        alt: what it shows, in words, for readers who do not see it.
        size: width and height in inches.
    """

    draw: Callable[[Axes], object]
    alt: str
    size: tuple[float, float] = PANEL


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
            canvas = self._all_panels()
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

    def _all_panels(self) -> Canvas:
        columns = min(COLUMNS, len(self.panels))
        lines = math.ceil(len(self.panels) / columns)
        width, height = self.panels[0].size
        canvas = Canvas(figsize=(columns * width, lines * height), layout="constrained")
        FigureCanvasAgg(canvas)
        for number, panel in enumerate(self.panels, 1):
            panel.draw(canvas.add_subplot(lines, columns, number))
        return canvas


def inline_svg(panel: Panel, name: str) -> str:
    """A panel as an `<svg>` element for an HTML page.

    Its colours are the page's CSS variables, its width is the page's, and its ids begin with `name`, so that no two
    drawings of a page share one.
    """
    with matplotlib.rc_context(style()):
        canvas = Canvas(figsize=panel.size, layout="constrained")
        FigureCanvasSVG(canvas)
        panel.draw(canvas.add_subplot())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{_attribute(panel.alt)}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("xlink:href", "href").replace("url(#", f"url(#{name}-")
    for variable, (light, _) in COLOURS.items():
        text = text.replace(f": {light}", f": var(--{variable})")
    return text.strip()


def _attribute(text: str) -> str:
    """Text as it may stand in an attribute."""
    for plain, escaped in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(plain, escaped)
    return text
