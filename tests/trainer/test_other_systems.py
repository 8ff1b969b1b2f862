"""Where a module or a call of POSIX is missing, as on Windows, everything can still be imported and the
commands start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_core.engine.text_cache import cache_folder
from apt_core.files.atomic import replacing

ROOT = Path(__file__).parents[2]
HIDE = """
import os, signal, sys, multiprocessing
# Other packages, imported for this system before it is hidden.
import av, filelock, psutil, matplotlib.figure, scipy.linalg
import torch.utils.tensorboard, torch.distributed.run, torch.distributed.fsdp
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import UMT5EncoderModel
for name in ("resource", "fcntl", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sysconf", "getuid", "geteuid"):
    if hasattr(os, name): delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    if hasattr(signal, name): delattr(signal, name)
sys.path.insert(0, {root!r})
"""


def without_posix(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(root=str(ROOT)) + code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"APT_CACHE": str(tmp_path / "cache")},
    )


def test_every_module_can_be_imported(tmp_path):
    done = without_posix(
        "import importlib, pkgutil, apt_core, trainer\n"
        "names = [m.name for p in (apt_core, trainer) for m in pkgutil.walk_packages(p.__path__, "
        "p.__name__ + '.') if not m.name.endswith('__main__')]\n"
        "[importlib.import_module(name) for name in names if name != 'apt_core.engine.kernels']\n"
        "print(len(names))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 60


def test_precompute_training_export_and_inspect_start(tmp_path):
    run = "from typer.testing import CliRunner\nfrom trainer.__main__ import app\nimport sys\n"
    small = "['data.images=4', 'data.clips=0', 'held_out=0', 'save_every=1', 'judge_samples=0']"
    steps = [
        (
            "['adversarial', 'mini', '--phase', 'image', 'updates=1', 'batch=2', 'warmup=0', "
            f"'--out', 'run', *{small}]"
        ),
        "['export', 'run/states/image', '--out', 'out.safetensors']",
        "['inspect', 'out.safetensors']",
        "['generate', 'out.safetensors', 'a red circle', '--out', 'samples']",
    ]
    for step in steps:
        run += (
            f"r = CliRunner().invoke(app, {step}, catch_exceptions=False)\nprint(r.output)\nassert "
            "r.exit_code == 0\n"
        )
    done = without_posix(run, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list((tmp_path / "samples").iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
def test_a_cache_in_a_shared_folder_is_ones_own(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError

    monkeypatch.delenv("APT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"comfyui-apt-{os.getuid()}"
    assert cache_folder() == usual and usual.stat().st_mode & 0o777 == 0o700
    usual.chmod(0o777)  # somebody else could have put something there
    assert cache_folder() != usual
    usual.rmdir()
    (tmp_path / "elsewhere").mkdir()
    usual.symlink_to(tmp_path / "elsewhere")
    other = cache_folder()
    assert other != usual and other.stat().st_mode & 0o777 == 0o700


def test_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    with replacing(tmp_path / "run.json") as part:
        pass
    name, _, end = part.name.rpartition("-")
    for number in range(int(end.split(".")[0]) + 1, 20 + int(end.split(".")[0])):  # whichever comes next
        part.with_name(f"{name}-{number}.partial").symlink_to(victim)
    with replacing(tmp_path / "run.json") as part:
        part.write_text("new", encoding="utf-8")
    assert (
        victim.read_text(encoding="utf-8") == "mine"
        and (tmp_path / "run.json").read_text(encoding="utf-8") == "new"
    )
