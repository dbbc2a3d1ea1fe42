"""What the tests of the report share: how its files are read, and what a parser finds on its page."""

import csv
from html.parser import HTMLParser
from pathlib import Path

from conftest import run_main

from evaluation import report

# Elements that have no end.
VOID = {"meta", "link", "br", "img", "input", "hr", "path", "rect", "use", "circle", "line", "image", "stop"}


def page_of(run: Path) -> str:
    """The text of a run's page, which is written again."""
    run_main(report, run)
    return (run / "report.html").read_text("utf-8")


def table(run: Path, name: str) -> list[dict[str, str]]:
    """The numbers of a figure, from the CSV file beside the page."""
    with (run / "report" / f"{name}.csv").open(encoding="utf-8") as file:
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
