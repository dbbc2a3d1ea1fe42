"""Every placement of the product (`.to(device)`, `.cpu()`, `device=...`), found in its source, and any one removed.

A placement is removed by replacing the code of the function that contains it, in memory, so that every module that has
imported the function runs the changed code. The line numbers stay the same.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

from conftest import ROOT
from device_rules import CPU
from torch import Tensor

# The first argument of a `.to(...)` that changes only the dtype.
DTYPE = re.compile(r"dtype|torch\.(float|bfloat|int|long|half|double)|getattr\(torch,")
MARK = "_placement_reached"


@dataclass(frozen=True, order=True)
class Placement:
    """One placement: file, line and column, the function around it, and the expression as it is written."""

    file: str
    line: int
    column: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.code}"


class _Rewrite(ast.NodeTransformer):
    """Collects the placements of one file, and removes one of them or wraps each in calls that report what it does."""

    def __init__(self, file: str, remove: Placement | None = None):
        self.file, self.remove, self.found, self.functions = file, remove, [], []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()
        return node

    visit_ClassDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> ast.AST:
        without = _without(node)
        placement = None if without is None else self._placement(node)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr == "to"):
            node.func = self.visit(node.func)
        else:
            node.func.value = self.visit(node.func.value)
        node.args = [self.visit(arg) for arg in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node if placement is None else self._rewritten(placement, node, _without(node))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """A method `x.to` that is handed on and called elsewhere."""
        placement = self._placement(node) if node.attr == "to" else None
        self.generic_visit(node)
        if placement is None:
            return node
        keeps = ast.parse("(lambda kept: lambda *_: kept)(0)", mode="eval").body
        keeps.args = [node.value]
        return self._rewritten(placement, node, keeps)

    def _placement(self, node: ast.expr) -> Placement:
        placement = Placement(self.file, node.lineno, node.col_offset, ".".join(self.functions), ast.unparse(node))
        self.found.append(placement)
        return placement

    def _rewritten(self, placement: Placement, node: ast.expr, without: ast.expr) -> ast.expr:
        if self.remove is None:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cpu"):
                node.func.value = self._report("before", placement, node.func.value)
            return self._report("after", placement, node)
        return without if placement == self.remove else node

    def _report(self, when: str, placement: Placement, value: ast.expr) -> ast.expr:
        return ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(when), ast.Constant(astuple(placement)), value], [])


def _without(node: ast.Call) -> ast.expr | None:
    """The call without its placement, or None if it has none."""
    if isinstance(node.func, ast.Attribute) and node.func.attr == "cpu" and not node.args:
        return node.func.value
    if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        if not node.args or DTYPE.search(ast.unparse(node.args[0])):
            return None
        where = ast.unparse(node.args[0])
        if "device" in where or "'" in where:
            rest = node.args[1:]
        else:  # a tensor, whose dtype still counts
            rest = [ast.Attribute(node.args[0], "dtype", ast.Load())]
        return ast.Call(node.func, rest, []) if rest else node.func.value
    kept = [keyword for keyword in node.keywords if keyword.arg != "device"]
    return ast.Call(node.func, node.args, kept) if len(kept) < len(node.keywords) else None


def _rewrite(file: str, remove: Placement | None = None) -> tuple[list[Placement], ast.Module]:
    rewrite = _Rewrite(file, remove)
    tree = rewrite.visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return rewrite.found, ast.fix_missing_locations(tree)


@cache
def files() -> tuple[str, ...]:
    """The files of the product that have placements."""
    paths = [*ROOT.glob("*.py"), *(path for folder in ("core", "evaluation") for path in (ROOT / folder).rglob("*.py"))]
    return tuple(name for name in sorted(str(path.relative_to(ROOT)) for path in paths) if _rewrite(name)[0])


def placements() -> list[Placement]:
    return [placement for file in files() for placement in _rewrite(file)[0]]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _module(file: str) -> ModuleType:
    return import_module(file.removesuffix(".py").replace("/", "."))


def _function(file: str, name: str) -> FunctionType:
    """The function or method of that name, without the decorators around it."""
    found: Any = _module(file)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
        found = getattr(found, "__func__", getattr(found, "fget", getattr(found, "func", found)))
    return inspect.unwrap(found)


def _outermost(placement: Placement) -> str:
    """The function of the module, or the method of a class, that contains the placement."""
    first, *rest = placement.function.split(".")
    return f"{first}.{rest[0]}" if inspect.isclass(getattr(_module(placement.file), first)) else first


@contextmanager
def _replaced(file: str, tree: ast.Module, names: set[str]) -> Iterator[None]:
    codes = {code.co_qualname: code for code in _codes(compile(tree, str(ROOT / file), "exec", dont_inherit=True))}
    with ExitStack() as stack:
        for name in names:
            function = _function(file, name)
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = codes[name]
        yield


@contextmanager
def removed(placement: Placement) -> Iterator[None]:
    """Run the product without one placement inside the block."""
    with _replaced(placement.file, _rewrite(placement.file, placement)[1], {_outermost(placement)}):
        yield


@contextmanager
def watched() -> Iterator[set[Placement]]:
    """Yield a set that fills with the placements that move a tensor inside the block, or make one on the device."""
    moving: set[Placement] = set()
    before: dict[tuple, list[Any]] = {}

    def report(when: str, placement: tuple, value: Any) -> Any:
        where = value.device if isinstance(value, Tensor) else None
        if when == "before":
            before.setdefault(placement, []).append(where)
        elif where is None or where != (before[placement].pop() if placement in before else CPU):
            moving.add(Placement(*placement))
        return value

    with ExitStack() as stack:
        stack.enter_context(mock.patch(f"builtins.{MARK}", report, create=True))
        for file in files():
            found, tree = _rewrite(file)
            stack.enter_context(_replaced(file, tree, {_outermost(placement) for placement in found}))
        yield moving
