"""The look of all figures and of the page: the only file that names a colour.

Every colour has two values, for a light and for a dark page. Figures are drawn in the light ones. On the page each
colour is a CSS variable, so that one drawing follows the reader's choice (`evaluation.figures.figure.inline_svg`).
"""

from __future__ import annotations

from typing import Any

# Name -> (on a light page, on a dark page). The series began as Okabe and Ito's colours, and were moved as little as
# possible until each has a contrast of at least 3 to its page and the first four are well apart for readers with
# deuteranopia, protanopia and tritanopia. tests/evaluation/test_figures.py holds both.
COLOURS = {
    "surface": ("#ffffff", "#15181d"),
    "panel": ("#f6f7f9", "#1d2127"),
    "rule": ("#d8dce2", "#363c45"),
    "ink": ("#1c2128", "#e7eaee"),
    "muted": ("#57606b", "#a8b1bc"),
    "blue": ("#004fad", "#5bb3f0"),
    "orange": ("#d04700", "#f79346"),
    "green": ("#008160", "#2ff0a9"),
    "pink": ("#b95999", "#d7a1b4"),
    "sky": ("#2e93cb", "#8ed2fa"),
    "gold": ("#6a7907", "#eddc55"),
    "grey": ("#747d88", "#8b95a1"),
}
SERIES = ("blue", "orange", "green", "pink", "sky", "gold", "grey")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ARMS = ("fused", "no_hot", "fused_adapted", "distill", "base")
# Of shares and densities: dark is little and bright is much, also without colour vision and in grey print.
SEQUENTIAL = "cividis"
# The sizes of one panel in inches. On the page panels flow into one, two or three columns.
PANEL = (3.5, 2.8)
WIDE = (3.8, 2.7)
# Fill and edge of marks on a heat map, whose own colours are the same on a light and on a dark page: none of `COLOURS`,
# so that the marks do not change either.
MARK, MARK_EDGE = "#cf4600", "#fdfdfd"


def colour(name: str) -> str:
    """The light value of a colour, in which figures are drawn."""
    return COLOURS[name][0]


def series(number: int) -> dict[str, Any]:
    """Colour, marker and line of the series with this number: colours and markers differ, so that neither is needed
    alone, and from the eighth series on, where they come again, lines are dashed."""
    again, place = divmod(number, len(SERIES))
    return {"color": colour(SERIES[place]), "marker": MARKERS[place], "linestyle": "--" if again else "-"}


def series_of(arm: str) -> dict[str, Any]:
    """The look of an arm, the same in every figure that tells several arms apart by colour."""
    return series(ARMS.index(arm))


def css_variables(dark: bool) -> str:
    """The colours as declarations of CSS variables."""
    return " ".join(f"--{name}: {values[dark]};" for name, values in COLOURS.items())


def style() -> dict[str, Any]:
    """Matplotlib's settings for every figure."""
    return {
        "svg.fonttype": "none",  # text stays text, so that it can be read aloud, searched and selected
        "svg.hashsalt": "transport-and-merge",  # the same figure has the same bytes
        "text.parse_math": False,  # names of models and runs are no formulas, whatever dollar signs they have
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.edgecolor": colour("muted"),
        "axes.labelcolor": colour("ink"),
        "axes.titlecolor": colour("ink"),
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": colour("rule"),
        "grid.linewidth": 0.6,
        "text.color": colour("ink"),
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "xtick.labelcolor": colour("ink"),
        "ytick.labelcolor": colour("ink"),
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 3.5,
        "image.cmap": SEQUENTIAL,
        "image.interpolation": "none",
        "image.aspect": "auto",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
    }
