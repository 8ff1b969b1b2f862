"""The pack's door and its help pages, without ComfyUI."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODES = {name: info for name, info in json.loads((ROOT / "tests/workflows/object_info.json").read_text(encoding="utf-8")).items() if name.startswith("APT")}

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
    for script in (AS_COMFYUI_DOES, "import runpy; assert 'comfy_entrypoint' not in runpy.run_path('__init__.py')"):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_node_has_its_help_page_and_no_page_is_left_over():
    web = re.search(r'^WEB_DIRECTORY = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert sorted(page.stem for page in (ROOT / web / "docs").iterdir()) == sorted(NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_explains_every_input(name):
    page = (ROOT / "nodes/web/docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {NODES[name]['display_name']}\n")
    rows = re.findall(r"^\| (\w+) \|", page, re.MULTILINE)
    inputs = [key for section in ("required", "optional") for key in NODES[name]["input"].get(section, {})]
    assert [row for row in rows if row in inputs] == inputs
    assert page.count("```") == 2, "a small graph"
