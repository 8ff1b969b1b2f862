"""The examples run as they are, and leave what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from apt_core.files.checkpoint_header import read_metadata

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def run(name: str, out: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "APT_CACHE": str(out / "cache")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(out)],
        capture_output=True,
        text=True,
        cwd=out,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def frames(path: Path) -> int:
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_the_list_has_all_of_them():
    listed = re.findall(
        r"^\| `(\w+)\.py`", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert sorted(listed) == NAMES and len(NAMES) == 5


def test_one_step(tmp_path):
    run("one_step", tmp_path)
    assert frames(tmp_path / "one-step.mp4") == frames(tmp_path / "two-steps.mp4") == 9
    assert (tmp_path / "one-step.mp4").read_bytes() != (tmp_path / "two-steps.mp4").read_bytes()


def test_noise_walk(tmp_path):
    run("noise_walk", tmp_path)
    assert frames(tmp_path / "walk.mp4") == 24


def test_lora_on_one_base(tmp_path):
    run("lora_on_one_base", tmp_path)
    assert read_metadata(tmp_path / "apt-lora.safetensors")["kind"] == "lora"


@pytest.mark.parametrize(
    "name, figure", [("adversarial_training", r"D ([\d.]+) \+"), ("distillation", r": ([\d.]+)")]
)
def test_trainings_train(name, figure, tmp_path):
    losses = [float(value) for value in re.findall(figure, run(name, tmp_path))]
    assert len(losses) == 10 and losses[-1] < losses[0]
