"""docs/architecture.md is true: which rooms there are, and that imports between them run one way."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = "the package itself"
ENTRY = "__main__"
ROOM = re.compile(r"^\| `(\w+)/` \|", re.MULTILINE)


def rooms(package: str) -> list[str]:
    """In the order of the page, lowest first."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, after = page.partition(f"`{package}/`, ")
    return ROOM.findall(after.partition("\n\n|")[2].partition("\n\n")[0])


def imports(package: str) -> Iterator[tuple[str, str, str]]:
    """(file, its room, the room that it imports), for all imports within the package, also those inside
    functions.
    """
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else ENTRY if parts[-1] == ENTRY else TOP
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for module in imported(node, parts[:-1]):
                names = module.split(".")
                if names[0] == package and len(names) > 1:
                    yield "/".join(parts), room, names[1] if (ROOT / package / names[1]).is_dir() else TOP


def imported(node: ast.AST, folder: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    start = list(folder[: len(folder) - node.level + 1]) if node.level else []
    if node.module:
        return [".".join([*start, node.module])]
    return [".".join([*start, name.name]) for name in node.names]


@pytest.mark.parametrize("package", ["apt_core", "trainer"])
def test_the_page_names_every_room(package):
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert set(rooms(package)) == folders


def lost_modules(package: str, page: str) -> list[str]:
    """The modules that the rows of a package's rooms name, and that are not there. Classes have capitals."""
    _, _, after = page.partition(f"`{package}/`, ")
    rows = re.findall(
        r"^\| `(\w+)/` \| (.+) \|$", after.partition("\n\n|")[2].partition("\n\n")[0], re.MULTILINE
    )
    assert len(rows) == len(rooms(package))
    named = [f"{package}/{room}/{name}" for room, text in rows for name in re.findall(r"`([a-z]\w*)`", text)]
    return [name for name in named if not (ROOT / f"{name}.py").exists()]


@pytest.mark.parametrize("package", ["apt_core", "trainer"])
def test_the_modules_that_the_rows_name_are_there(package):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert lost_modules(package, page) == []
    gone = page.replace("`ema`", "`emma`").replace("`judge`", "`jury`")
    assert lost_modules(package, gone) == [
        {"apt_core": "apt_core/method/emma", "trainer": "trainer/run/jury"}[package]
    ]


MIDDLE = 50  # the column of the drawing before which the modules end that import those to the right of it


def drawn() -> Iterator[tuple[list[str], list[str]]]:
    """Of each line of the drawing with modules on the right: who imports them (if the middle names nobody,
    who stands there last), and the modules.
    """
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    who: list[str] = []
    for line in drawing.splitlines():
        sides: tuple[list[str], list[str]] = [], []
        # "trainer/data/captions, media" is short for two modules of one room
        for found in re.finditer(r"((?:apt_core|trainer|nodes)(?:/\w+)*)/(\w+(?:, \w+\b(?!/))*)", line):
            sides[found.start() > MIDDLE].extend(f"{found[1]}/{name}" for name in found[2].split(", "))
        who = sides[0] or who
        yield who, sides[1]


def files_imported(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    folder = tuple(module.split("/")[:-1])
    found = {name for node in ast.walk(tree) for name in imported(node, folder)}
    found |= {
        f"{start}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for start in imported(node, folder)
        for name in node.names
    }
    return {name.replace(".", "/") for name in found}


def not_imported(drawn: Iterable[tuple[list[str], list[str]]]) -> list[str]:
    """The modules on the right that none of those in the middle imports."""
    lost = []
    for who, modules in drawn:
        there = set().union(*(files_imported(module) for module in who)) if modules else set()
        lost += [module for module in modules if module not in there]
    return lost


def test_the_modules_of_the_drawing_are_there():
    paths = [path for who, modules in drawn() for path in (*who, *modules)]
    assert len(set(paths)) > 40
    assert [path for path in paths if not (ROOT / f"{path}.py").exists()] == []


def test_what_the_drawing_has_on_the_right_is_imported_by_what_stands_in_the_middle():
    lines = list(drawn())
    assert sum(len(modules) for _, modules in lines) > 20
    assert not_imported(lines) == []
    assert not_imported([(["trainer/stages/distill"], ["apt_core/method/objectives"])]) == [
        "apt_core/method/objectives"
    ]


@pytest.mark.parametrize("package", ["apt_core", "trainer"])
def test_imports_between_rooms_run_one_way(package):
    order = [TOP, *rooms(package), ENTRY]
    found = list(imports(package))
    assert len(found) > 50
    wrong = [
        f"{file} imports {target}/"
        for file, room, target in found
        if order.index(target) > order.index(room) and not (room == TOP and file.endswith("__init__"))
    ]
    assert not wrong, wrong


def test_library_nodes_and_trainer_meet_in_the_library_alone():
    for package, others in {
        "apt_core": ("trainer", "nodes"),
        "nodes": ("trainer",),
        "trainer": ("nodes",),
    }.items():
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for other in others:
                assert not re.search(rf"^\s*(from|import) \.*{other}\b", text, re.MULTILINE), (
                    f"{file} imports {other}"
                )
