"""Runs pieces of a real ComfyUI in a process of its own: it wants its own packages, command line and module names.

COMFYUI_DIR is a checkout of ComfyUI, COMFYUI_PYTHON the interpreter that has its requirements (by default the tests' own).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("set COMFYUI_DIR to a ComfyUI checkout (and COMFYUI_PYTHON to its interpreter) to test against the real thing")
    if not (Path(folder) / "comfy" / "sd.py").is_file():
        pytest.fail(f"COMFYUI_DIR is {folder}, which is not a ComfyUI checkout (it has no comfy/sd.py)")
    return Path(folder).resolve()


@pytest.fixture
def comfyui(comfyui_dir, tmp_path):
    """comfyui(helper, **paths): run helpers/<helper>.py in ComfyUI; the paths are its arguments, its last line of JSON the result."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)

    def run(helper: str, **paths) -> dict:
        job = json.dumps({key: str(value) for key, value in paths.items()})
        command = [python, str(HELPERS / f"{helper}.py"), str(comfyui_dir), str(tmp_path / "comfyui"), job]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, f"ComfyUI failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
