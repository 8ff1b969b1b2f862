"""README and docs say what is there: links lead somewhere, the functions and tests that are named exist, and
the commands are ones that the command line takes.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from trainer.__main__ import app

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "example_workflows" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROSE = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "nodes" / "web" / "docs").rglob("*.md"))]
WIDEST = 110
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TERMINAL = re.compile(r"```sh\n(.*?)```", re.S)
COMMAND = re.compile(r"-m trainer\s+(.+)$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def long_lines(text: str) -> list[str]:
    """Lines wider than `WIDEST` that could be broken: not of tables, nor what a program printed (a block that
    names no language), nor a line without a space, nor the README's set-up lines, which `.ci/run` takes whole.
    """
    found, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
            continue
        whole = line.startswith(("|", "python3 -m venv")) or language == "" or " " not in line.strip()
        if len(line) > WIDEST and not whole:
            found.append(line)
    return found


def test_long_lines_are_found_where_they_can_be_broken():
    long = "word " * 30
    assert long_lines(f"short\n{long}\n```sh\n{long}\n```\n") == [long, long]
    assert long_lines(f"| {long} |\n```\n{long}\n```\n{'x' * 200}\n") == []


@pytest.mark.parametrize("page", PROSE, ids=[page.relative_to(ROOT).as_posix() for page in PROSE])
def test_lines_of_pages_are_not_too_long(page):
    assert long_lines(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    links = [
        link.partition("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))
        if not link.startswith(("http", "#"))
    ]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)\)", text_of(ROOT / "README.md")))
    assert linked == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}


def rows_of_the_method() -> list[str]:
    return [
        line
        for line in text_of(ROOT / "docs" / "method.md").splitlines()
        if "tests/" in line and line.startswith("|")
    ]


def test_the_table_of_the_method_is_there():
    assert len(rows_of_the_method()) >= 20


@pytest.mark.parametrize("row", rows_of_the_method(), ids=lambda row: row.split("|")[2].strip()[:40])
def test_every_function_and_every_test_of_the_method_exists(row):
    functions, tests = re.findall(r"`([\w.]+):(\w+)`", row), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
    assert functions and tests
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), f"{module}:{name}"
    for file, name in tests:
        defined = {
            node.name for node in ast.parse(text_of(ROOT / file)).body if isinstance(node, ast.FunctionDef)
        }
        assert name in defined, f"{file}::{name}"


def commands_of(page: Path) -> list[str]:
    """What follows `-m trainer` in the page's blocks of shell lines, variables that the block sets filled in."""
    found = []
    for block in TERMINAL.findall(text_of(page).replace("\\\n", "")):
        variables = dict(re.findall(r'^(\w+)="?([^"\n]*?)"?$', block, re.M))
        for line in block.splitlines():
            for _ in range(3):
                line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
            if match := COMMAND.search(line.partition("  #")[0]):
                found.append(match[1].strip().rstrip("'"))
    return found


ALL = [(name, command) for page, name in zip(PAGES, NAMES) for command in commands_of(page)]


def test_there_are_commands():
    assert len(ALL) >= 20


def stubbed(command, seen: list):
    """The whole command line, with nothing behind it but a note of what it was given."""
    for one in getattr(command, "commands", {}).values():
        stubbed(one, seen)
    if not hasattr(command, "commands"):
        command.callback = lambda **given: seen.append(given)
    return command


@pytest.mark.parametrize("name, command", ALL, ids=[f"{name}-{command[:50]}" for name, command in ALL])
def test_every_command_is_one_that_the_command_line_takes(name, command):
    seen: list = []
    stubbed(typer.main.get_command(app), seen).main(shlex.split(command), standalone_mode=False)
    assert len(seen) == 1


def test_a_command_that_is_none_is_noticed():
    for wrong in ("demo --sede 1", "generat mini", "export"):
        with pytest.raises(Exception, match="(?i)no such|missing"):
            stubbed(typer.main.get_command(app), []).main(shlex.split(wrong), standalone_mode=False)
