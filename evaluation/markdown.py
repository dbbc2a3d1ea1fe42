"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], numbers: str = "---") -> list[str]:
    """The lines of a table of cells, whose first row is the head.

    Args:
        numbers: alignment of all columns but the first; `---:` aligns them on the right.
    """
    rule = ["---", *[numbers] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
