"""Kills at any moment and a disk that takes no more: a run goes on to the same weights, and says why it
ended.

Slow: `pytest -m slow tests/faults/test_kills.py`; $KILLS says how many runs are killed (20).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apt_core.files.tensorfile import read_tensors

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", 20))
RESULT = "apt-tiny.safetensors"
LIMITS = (2**12, 2**16, 2**20, 2**22)
"""Bytes that a file may have: from the smallest JSON to a whole training state."""


def start(out: Path, limit: int | None = None) -> subprocess.Popen:
    """A whole tiny demo in a process group of its own. limit: bytes that a file of it may have."""
    preset = ROOT / "tests" / "trainer" / "tiny.toml"
    command = [sys.executable, "-m", "trainer", "demo", "--preset", preset, "--recipe", "paper"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def small_files() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [*command, "--samples", "4", "--out", out],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=small_files if limit else None,
    )


def finish(out: Path) -> None:
    run = start(out)
    _, said = run.communicate(timeout=600)
    assert run.returncode == 0, said


def left_behind(out: Path) -> list[Path]:
    """Halves of files that no process writes any more."""
    return [path for path in out.rglob("*") if path.name.endswith((".partial", ".part", ".old"))]


def assert_same(one: Path, other: Path) -> None:
    a, b = read_tensors(one / RESULT)[0], read_tensors(other / RESULT)[0]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, and how long it took in seconds."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    finish(out)
    return out, time.monotonic() - started


def test_a_killed_run_goes_on_to_the_same_weights(undisturbed, tmp_path):
    expected, seconds = undisturbed
    dice = random.Random(0)
    for number in range(KILLS):
        out = tmp_path / str(number)
        run = start(out)
        try:
            run.wait(dice.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        finish(out)
        assert_same(expected, out)
        assert not left_behind(out)


@pytest.mark.skipif(os.name != "posix", reason="limits of files are POSIX")
@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_is_one_sentence_and_costs_nothing(undisturbed, tmp_path, limit):
    out = tmp_path / "run"
    run = start(out, limit)
    _, said = run.communicate(timeout=600)
    assert run.returncode in (0, 2), said
    assert "Traceback" not in said and not left_behind(out)
    if run.returncode:
        assert said.splitlines()[-1].startswith("error: "), said
    finish(out)
    assert_same(undisturbed[0], out)
