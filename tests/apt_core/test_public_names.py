"""`from apt_core import ...`: every short name is there, is the one of its room, and costs nothing before it
is asked for.
"""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import apt_core

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_that_of_its_room():
    assert sorted(apt_core.__all__) == apt_core.__all__ and set(apt_core.__all__) <= set(dir(apt_core))
    for name in apt_core.__all__:
        found = getattr(apt_core, name)
        assert found is getattr(import_module(found.__module__), name) and found.__doc__, name


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "apt_core" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert sorted(alias.name for node in block.body for alias in node.names) == apt_core.__all__


def test_the_version_is_that_of_the_package():
    assert apt_core.__version__ == version("comfyui-apt")


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, apt_core; dir(apt_core); print(sorted({'torch', 'numpy', "
        "'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_two_kinds_of_a_users_error_can_be_told_apart():
    assert issubclass(apt_core.AptError, ValueError) and not issubclass(apt_core.AptError, RuntimeError)
    for one, other in (
        (apt_core.OutOfMemory, apt_core.NotFinite),
        (apt_core.NotFinite, apt_core.OutOfMemory),
    ):
        assert issubclass(one, apt_core.AptError) and not issubclass(one, other)
        assert str(one("a\nb")) == "a\\nb"  # one line, as AptError makes it
