"""Texts that every installation has: Python's own documentation, and prose about the benchmarks of lm-eval."""

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 200
# Modules and packages that do not document Python, or repeat its documentation.
LEFT_OUT = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "turtledemo"}
# What a paragraph of prose does not hold: lists, headings, tables, code, addresses.
NO_PROSE = re.compile(r"^\s*([-*+|#>$]|\d+\.)|https?:|[|{}<>=\\]|`.*`.*`.*`", re.MULTILINE)
FENCED = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)


def python_reference() -> list[dict[str, Any]]:
    """Paragraphs of at least 200 characters from `pydoc_data.topics` and from the docstrings of the standard library's
    modules (PSF licence), each paragraph once.

    Returns:
        Rows {"text", "group"}. A group is a topic or a module. Topics and modules that share a paragraph are one group,
        so that a split by group never puts a topic, a module, or one of their paragraphs into two parts.
    Raises:
        ModuleNotFoundError: this Python has no `pydoc_data`, or no source files of the standard library. Some
            distributions ship them as packages of their own.
    """
    return _in_groups((*_topics(), *_docstrings()))


def benchmark_prose() -> list[dict[str, Any]]:
    """Paragraphs of English prose, of at least 200 characters, from the pages on benchmarks that the package lm_eval
    ships (MIT licence): mostly the abstracts of the papers that introduced them, each paragraph once.

    CPython ships no such text: beside its documentation there is its licence, and the licences of all packages are a
    dozen texts that repeat each other.

    Returns:
        Rows {"text", "group"}. A group is a folder of benchmarks, joined with others as in `python_reference`.
    Raises:
        ModuleNotFoundError: lm_eval is not installed, or without these pages.
    """
    package = find_spec("lm_eval")  # nothing is imported
    roots = package.submodule_search_locations if package else None
    folders = [Path(root) / "tasks" for root in roots or ()]
    texts = [
        (page.relative_to(folder).parts[0], FENCED.sub("", page.read_text("utf-8")))
        for folder in folders
        for page in sorted(folder.rglob("README.md"))
    ]
    if not texts:
        raise ModuleNotFoundError(name="lm_eval (with its folder tasks)")
    prose = ((name, "\n\n".join(filter(_is_prose, _paragraphs(text)))) for name, text in texts)
    return _in_groups(prose)


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph consists of English sentences; a foreign name or a dash does no harm."""
    foreign = sum(not character.isascii() for character in paragraph)
    return paragraph[0].isupper() and foreign < 0.02 * len(paragraph) and not NO_PROSE.search(paragraph)


def _in_groups(texts: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows {"text", "group"} of all paragraphs of the texts (name, text), each once. Names that share a paragraph are
    one group."""
    from scipy.cluster.hierarchy import DisjointSet  # imports half of scipy, which other data does not need

    groups: DisjointSet = DisjointSet()
    first: dict[str, str] = {}  # paragraph -> the name under which it was found first
    for name, text in texts:
        groups.add(name)
        for paragraph in _paragraphs(text):
            groups.merge(name, first.setdefault(paragraph, name))
    return [{"text": text, "group": min(groups.subset(name))} for text, name in first.items()]


def _topics() -> Iterator[tuple[str, str]]:
    """(name, text) of every topic of the language reference."""
    from pydoc_data.topics import topics  # 700 KB of text, and some Pythons do not have it

    for topic in sorted(topics):
        yield f"topic {topic}", topics[topic]


def _docstrings() -> Iterator[tuple[str, str]]:
    """(name, docstring) of every docstring of the standard library's modules and packages.

    They are read from the source files; nothing is imported. Of a package only `__init__` is read, because that is what
    the package documents. With the modules below it, a few packages would be as large as all other modules together.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = {file.stem: file for file in folder.glob("*.py")}
    files |= {file.parent.name: file for file in folder.glob("*/__init__.py")}
    if "argparse" not in files:
        raise ModuleNotFoundError(name=f"source files of the standard library in {folder}")
    for module in sorted(files.keys() - LEFT_OUT):
        source = files[module].read_text(encoding="utf-8")
        # Parsing takes most of the time, and half of the files have no docstring that is long enough.
        if any(_paragraphs(docstring) for docstring in DOCSTRING.findall(source)):
            for docstring in _docstrings_in(ast.parse(source)):
                yield f"module {module}", docstring


def _docstrings_in(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstring of a module, class or function, and of all classes and functions in it."""
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_in(child)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are long enough."""
    return [p for paragraph in re.split(r"\n\s*\n", text) if len(p := paragraph.strip()) >= MIN_CHARACTERS]
