"""General texts that come with Python: its language reference, and the docstrings of the standard library."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 200
# Modules and packages that do not document Python, or repeat its documentation.
LEFT_OUT = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "turtledemo"}
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
    from scipy.cluster.hierarchy import DisjointSet  # imports half of scipy, which other data does not need

    groups: DisjointSet = DisjointSet()
    first: dict[str, str] = {}  # paragraph -> the topic or module in which it was found first
    for name, text in (*_topics(), *_docstrings()):
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
