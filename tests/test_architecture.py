"""docs/architecture.md is true: which rooms there are, and that imports between them run one way."""

import ast
import re
from collections.abc import Iterator
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


def test_the_modules_of_the_drawing_are_there():
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    found = re.findall(r"((?:apt_core|trainer)(?:/\w+)*)/(\w+(?:, \w+\b(?!/))*)", drawing)
    # "trainer/data/captions, media" is short for two modules of one room
    paths = [f"{room}/{name}" for room, names in found for name in names.split(", ")]
    assert len(paths) > 20
    lost = [path for path in paths if not (ROOT / path).is_dir() and not (ROOT / f"{path}.py").exists()]
    assert lost == []


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
