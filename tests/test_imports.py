"""The arrows of the house: who may import whom, no circles, and no import inside a function but of heavy packages."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

# What every room may import, and what may import nothing but each other.
LEAVES = {
    "core.batching",
    "core.errors",
    "core.files",
    "core.fusion.projections",
    "core.hub",
    "core.locks",
    "core.manifest",
    "core.options",
    "core.progress",
}
# Room -> the rooms below it. Commands, evaluation and scripts are in no list: they stand on top and may import any.
BELOW = {
    "core.texts": set(),
    "core.data": {"core.texts"},
    "core.transport": set(),
    "core.hot_transport": {"core.transport"},
    "core.fusion": {"core.transport", "core.hot_transport"},
    "core.models": {"core.fusion", "core.data", "core.texts"},
    "core.training": {"core.models", "core.fusion", "core.data", "core.texts"},
    "core.runs": {
        "core.training",
        "core.models",
        "core.fusion",
        "core.hot_transport",
        "core.transport",
        "core.data",
        "core.texts",
    },
}
STAGES = {"run_activs_and_hot", "core.generate_hot_residual", "core.train_hot_residual_sft", "evaluation.compare_arms"}
# These take from a tenth of a second to several to import: a command loads them when it needs them, not for --help.
HEAVY = {
    "accelerate",
    "datasets",
    "datasketch",
    "geomloss",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "peft",
    "pydoc_data",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
}


def modules() -> dict[str, ast.Module]:
    """Every module of the product by its dotted name."""
    folders = ("core", "evaluation", "scripts")
    paths = [ROOT / "run_activs_and_hot.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for path, name in names.items()}


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a piece of code imports; of ours, `from core.runs import cost` is the module core.runs.cost."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inside)


def room(module: str) -> str:
    """A leaf, a room of core, or the module itself."""
    if module in LEAVES or not module.startswith("core."):
        return module
    return ".".join(module.split(".")[:2])


def test_no_room_imports_from_above():
    wrong = []
    for module, tree in MODULES.items():
        above = room(module)
        allowed = LEAVES if above in LEAVES else LEAVES | BELOW.get(above, set()) | {above}
        if above in LEAVES or above in BELOW:
            ours = {name for name in imported(tree) if name in MODULES and name != "core"}
            wrong += [f"{module} imports {name}" for name in sorted(ours) if room(name) not in allowed]
    assert not wrong


def test_stages_do_not_import_each_other():
    for stage in STAGES:
        assert not STAGES.intersection(imported(MODULES[stage])), stage


def test_there_is_no_circle():
    graph = {module: {name for name in imported(tree) if name in MODULES} for module, tree in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # a circle raises CycleError


def test_only_heavy_packages_are_imported_inside_functions():
    """Or modules of ours whose own first lines import one, or the pages, which import every figure."""
    slow = {"evaluation.pages.index_page", "evaluation.pages.report_page"} | {
        module
        for module, tree in MODULES.items()
        if any(name.split(".")[0] in HEAVY for node in tree.body for name in imported_here(node))
    }
    wrong = []
    for module, tree in MODULES.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            late = {name for name in imported(function) if name.split(".")[0] not in HEAVY and name not in slow}
            wrong += [f"{module}.{function.name} imports {name}" for name in late]
    assert not wrong


def imported_here(node: ast.stmt) -> Iterator[str]:
    """What a statement of a module's first level imports."""
    return imported(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else iter(())


def test_the_product_is_all_of_it():
    """The lists above name what exists, so that a renamed room cannot fall out of the test."""
    rooms = {room(module) for module in MODULES}
    assert rooms >= LEAVES | BELOW.keys() and MODULES.keys() >= STAGES
    assert {path.name for path in Path(ROOT / "core").iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        name.removeprefix("core.") for name in BELOW if f"{name}.__init__" in MODULES or name in MODULES
    } - {"data", "hot_transport"}
