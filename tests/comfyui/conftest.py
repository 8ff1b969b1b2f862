"""Runs pieces of a real ComfyUI in processes of its own: it wants its own packages, command line and module
names.

COMFYUI_DIR is a checkout of ComfyUI, COMFYUI_PYTHON the interpreter that has its requirements (by default the
tests' own), CHROMIUM a browser for the tests that need one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Frontend, chromium
from server import Server, one_thread
from stand_ins import make_stand_ins

HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip(
            "set COMFYUI_DIR to a ComfyUI checkout (and COMFYUI_PYTHON to its interpreter) to test against "
            "the real thing"
        )
    if not (Path(folder) / "comfy" / "sd.py").is_file():
        pytest.fail(f"COMFYUI_DIR is {folder}, which is not a ComfyUI checkout (it has no comfy/sd.py)")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def comfyui(comfyui_dir, tmp_path_factory):
    """comfyui(helper, **paths): run helpers/<helper>.py in ComfyUI; the paths are its arguments, its last
    line of JSON the result.
    """
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)

    def run(helper: str, **paths) -> dict:
        folder = tmp_path_factory.mktemp("comfyui")
        job = json.dumps({key: str(value) for key, value in paths.items()})
        command = [python, str(HELPERS / f"{helper}.py"), str(comfyui_dir), str(folder / "base"), job]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=1200, env=one_thread()
        )
        assert done.returncode == 0, f"ComfyUI failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def server(comfyui_dir, tmp_path_factory) -> Server:
    """A running server with the pack and the stand-ins for big models; one for all tests that do not count
    its memory.
    """
    base = tmp_path_factory.mktemp("server")
    make_stand_ins(base / "models")
    # ComfyUI holds text encoders in fp16 even on a CPU, and the numbers here are compared in fp32.
    with Server(comfyui_dir, base, "--fp32-text-enc") as running:
        yield running


@pytest.fixture(scope="session")
def frontend(comfyui_dir, request):
    """ComfyUI's frontend on that server, in a real browser."""
    executable = chromium()
    page = Frontend(request.getfixturevalue("server").url, executable)
    yield page
    page.close()
