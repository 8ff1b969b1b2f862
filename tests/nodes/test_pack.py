"""The pack's door and its help pages, without ComfyUI."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from shown_nodes import NODES, ROOT

AS_COMFYUI_DOES = """
import importlib.util, inspect, sys
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
assert inspect.iscoroutinefunction(pack.comfy_entrypoint)
assert sorted(name for name in sys.modules if name.startswith("pack")) == ["pack", "pack.nodes"], sys.modules
assert "torch" not in sys.modules
"""


def test_the_door_opens_without_comfyui():
    # As a package, and as the lone file that pytest and pip may come across.
    for script in (
        AS_COMFYUI_DOES,
        "import runpy; assert 'comfy_entrypoint' not in runpy.run_path('__init__.py')",
    ):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


IN_AN_OLD_COMFYUI = """
import asyncio, sys, types
# What ComfyUI 0.3.64 has of what the door asks for: no folder `apt`, and an extension whose on_load nobody
# calls.
folder_paths = sys.modules["folder_paths"] = types.ModuleType("folder_paths")
folder_paths.folder_names_and_paths = {}
if sys.argv[1:]:
    version = sys.modules["comfyui_version"] = types.ModuleType("comfyui_version")
    version.__version__ = sys.argv[1]
try:
    asyncio.run(pack.comfy_entrypoint())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
assert "pack.nodes.folders" not in sys.modules
"""


def test_an_old_comfyui_is_told_which_one_is_needed():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"][
        "requires-comfyui"
    ].removeprefix(">=")
    opened = AS_COMFYUI_DOES.partition("assert")[0]
    for version in ("0.3.64", "0.32.9", ""):
        command = [sys.executable, "-c", opened + IN_AN_OLD_COMFYUI, *([version] if version else [])]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        this = version or "an older one"
        assert (
            said.stdout
            == f"AptError: ComfyUI-APT needs ComfyUI {needed} or newer and this is {this}: update ComfyUI.\n"
        ), said.stderr
    for version in (needed, "0.33.1", "0.100.0", "1.0.0"):  # go on to what a stand-in has not
        said = subprocess.run(
            [sys.executable, "-c", opened + IN_AN_OLD_COMFYUI, version],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert said.stdout == "ModuleNotFoundError: No module named 'comfy_api'\n", said.stderr


def test_every_node_has_its_help_page_and_no_page_is_left_over():
    web = re.search(
        r'^WEB_DIRECTORY = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )[1]
    pages = {page.stem for page in (ROOT / web / "docs").iterdir()}
    differ = sorted(pages ^ NODES.keys())
    assert differ == [], "a page is missing, or tests/comfyui/build_workflows.py has not been run since"


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_explains_every_input(name):
    page = (ROOT / "nodes/web/docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {NODES[name]['display_name']}\n")
    items = re.findall(
        r"^- \*\*(\w+)\*\*: ", page.partition("\n## Inputs\n")[2].partition("\n## Outputs\n")[0], re.MULTILINE
    )
    inputs = [key for section in ("required", "optional") for key in NODES[name]["input"].get(section, {})]
    assert [item for item in items if item in inputs] == inputs
    outputs = page.partition("\n## Outputs\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- \*\*(\w+)\*\*: ", outputs, re.MULTILINE) == NODES[name]["output_name"]
    assert f"**{NODES[name]['display_name']}** \u2192" in page, "its place in a graph"


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_fits_the_narrow_panel(name):
    """About 350 pixels: what cannot be wrapped is cut off."""
    page = (ROOT / "nodes/web/docs" / f"{name}.md").read_text(encoding="utf-8")
    assert "```" not in page and not re.search(r"^\|", page, re.MULTILINE), "diagrams and tables do not wrap"
    assert max(map(len, re.sub(r"[*`]", "", page).split())) <= 32


def test_what_the_nodes_import_from_the_library_is_there():
    # Continuous integration has no ComfyUI, which swallows a failed import to one line and has no nodes then.
    found = [
        (file.name, node.module, alias.name)
        for file in sorted((ROOT / "nodes").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 2
        for alias in node.names
    ]
    assert len(found) > 20
    missing = []
    for file, module, name in found:
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            missing.append((file, module, name))
    assert missing == []
