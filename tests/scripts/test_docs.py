"""The pages say what is there: links, paths, names in the code, flags and figures. Nothing outside is fetched."""

import ast
import json
import re
import shlex
import tomllib

import pytest
import yaml
from conftest import ROOT

from core.errors import UserError
from core.runs.settings import all_settings
from scripts import write_stages_page

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# The changelog names what there was at its time.
OF_TODAY = [name for name in NAMES if name != "CHANGELOG.md"]
README_LINES = 120
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
# A file of this repository, with the name of something in it where `::` follows.
PATH = re.compile(
    r"((?:core|datasets|docs|evaluation|scripts|tests)/[\w./-]+\.\w+|run_activs_and_hot\.py)(?:::([\w.]+))?"
)
COMMAND = re.compile(r"(?:python|bash) (\S+\.(?:py|sh))( .*)")
# Flags of llama.cpp's converter, the harness and torchrun, and what every switch begins with when it is turned off.
OTHER_FLAGS = {"--outfile", "--model_args", "--include_path", "--nproc-per-node", "--no-"}
# Files that a reader is told to make.
TO_BE_MADE = {"scripts/experiments/yours.yaml"}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_in(text):
    """What stands in code spans and in fenced blocks."""
    return [*SPAN.findall(FENCE.sub("", text)), *FENCE.findall(text)]


def anchors_of(name):
    """The anchors of a page's headings, made as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ +(.+)$", FENCE.sub("", text_of(name)), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", LINK.sub(lambda link: link[0].partition("]")[0], heading).lower())
        anchor = anchor.replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def names_in(path):
    """What a module defines: functions, classes, methods as `Class.method`, and constants."""
    tree = ast.parse(text_of(path))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in LINK.findall(SPAN.sub("", FENCE.sub("", text_of(name)))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors_of(place.relative_to(ROOT)), f"{name}: {target} is no heading of that page"


@pytest.mark.parametrize("name", OF_TODAY)
def test_paths_and_names_of_the_code_exist(name):
    named = [found for code in code_in(text_of(name)) for found in PATH.findall(code)]
    for path, member in named:
        if path in TO_BE_MADE:
            continue
        assert (ROOT / path).is_file(), f"{name} names {path}, which does not exist"
        assert not member or member in names_in(path), f"{name} names {member}, which {path} does not define"


@pytest.mark.parametrize("name", OF_TODAY)
def test_flags_exist(name):
    known = {flag for command in write_stages_page.commands() for flag in flags_of(command)}
    told = {flag for code in code_in(text_of(name)) for flag in FLAG.findall(code)} - OTHER_FLAGS
    unknown = {flag for flag in told if flag.replace("_", "-") not in known}
    assert not unknown, f"{name} names flags that no command has: {', '.join(sorted(unknown))}"


def command_lines(text):
    """(file, arguments) of every command line with flags in code: of Python files, and of the main script."""
    for code in code_in(text):
        for line in code.replace("\\\n", " ").splitlines():
            found = COMMAND.search(line.replace("[", "").replace("]", ""))
            if found and "--" in found[2]:
                yield found[1], shlex.split(found[2], comments=True)


@pytest.mark.parametrize("name", OF_TODAY)
def test_command_lines_are_those_of_their_commands(name):
    """Each is read by the parser of its own command: another command's flag is no flag of it."""
    for file, arguments in command_lines(text_of(name)):
        if file == "scripts/run_train_final.sh":
            file, arguments = write_stages_page.RESOLVE, ["--started-in", ".", "--work-dir", ".", *arguments]
        if file in write_stages_page.commands():
            dashes = [word.replace("_", "-") if word.startswith("--") else word for word in arguments]
            try:
                write_stages_page.parser_of(file).parse_args(dashes)
            except (UserError, SystemExit) as error:
                pytest.fail(f"{name} calls {file} {' '.join(arguments)}: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_not_too_wide(name):
    wide = [line for line in text_of(name).splitlines() if len(line) > write_stages_page.WIDTH and line[0] != "|"]
    assert not wide, f"{name} has lines of more than {write_stages_page.WIDTH} columns: {wide}"


def flags_of(command):
    parser = write_stages_page.parser_of(command)
    return {flag.replace("_", "-") for action in parser._actions for flag in action.option_strings}


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= README_LINES


def test_each_page_begins_with_what_the_reader_can_do():
    for page in ROOT.glob("docs/*.md"):
        headings = re.findall(r"^#+ .+$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
        assert headings[1] == "## What you can do", page.name


def test_the_tables_of_all_flags_are_those_of_the_commands():
    numbers_and_words = write_stages_page.values_text(all_settings()["alpha"])
    assert numbers_and_words == "a number from 0 to 1, or `auto`, `learned`"
    assert write_stages_page.page() == text_of("docs/stages.md"), (
        "docs/stages.md is stale: run `python scripts/write_stages_page.py`, which rewrites its tables"
    )
    for setting in all_settings():
        assert f"`--{setting.replace('_', '-')}`" in text_of("docs/stages.md") or f"`{setting}:`" in text_of(
            "docs/stages.md"
        )


def test_the_code_tour_has_each_file_once():
    rows = re.findall(r"^\| `([^`]+)` \|", text_of("docs/code_tour.md"), re.MULTILINE)
    twice = sorted({path for path in rows if rows.count(path) > 1})
    assert not twice, f"docs/code_tour.md has more than one line for {', '.join(twice)}"
    places = ("core", "datasets", "evaluation", "scripts")
    files = {path.relative_to(ROOT).as_posix() for place in places for path in (ROOT / place).rglob("*.py")}
    missing = sorted((files | {"run_activs_and_hot.py"}) - set(rows))
    assert not missing, f"docs/code_tour.md has no line for {', '.join(missing)}"
    gone = [path for path in rows if not (ROOT / path).is_file()]
    assert not gone, f"docs/code_tour.md has a line for {', '.join(gone)}, which do not exist"


def test_the_figures_of_the_demo_are_those_that_were_measured():
    """README and results.md show tables with the losses and intervals of measurements.jsonl."""
    runs = [json.loads(line) for line in text_of("docs/measurements.jsonl").splitlines()]
    for name, what in {"README.md": "demo, quick", "docs/results.md": "demo, three seeds"}.items():
        (arms,) = (run["arms"] for run in runs if run["what"] == what)
        lines = {line.split()[0]: line for line in text_of(name).splitlines() if line.partition(" ")[0] in arms}
        assert lines.keys() == arms.keys()
        for arm, figures in arms.items():
            assert f" {figures['nll']:.4f} " in lines[arm]
            for key in ("diff", "fused_minus_arm"):
                low, high = figures["ci95" if key == "diff" else f"{key}_ci95"]
                shown = f"{figures[key]:+.4f} [{low:+.4f}, {high:+.4f}]"
                assert shown in lines[arm] or figures[key] == 0


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {citation['version']} - {citation['date-released']}" in text_of("CHANGELOG.md")
    assert "2602.05495" in citation["preferred-citation"]["url"] and len(citation["preferred-citation"]["authors"]) == 8
    assert text_of("LICENSE").split()[:3] == ["Apache", "License", "Version"]
