"""What is being written, and what is left of it after a kill, a failure, a signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apt_core.errors import AptError
from apt_core.files import atomic
from apt_core.files.atomic import PARTIAL, remove_own, replacing, replacing_folder
from apt_core.files.processes import host, is_alive, own

ROOT = Path(__file__).parents[2]
WRITE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from apt_core.files.atomic import replacing, replacing_folder
path = Path(sys.argv[1])
with (replacing_folder if sys.argv[2] == "folder" else replacing)(path) as part:
    (part / "weights" if part.is_dir() else part).write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start(path: Path, kind: str = "file") -> subprocess.Popen:
    """A process in the middle of writing `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE.format(root=str(ROOT)), str(path), kind],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    return process


def temporaries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


def fake(path: Path, where: str, pid: int, started: int, end: str = PARTIAL) -> Path:
    return path.with_name(f".{path.name}.{where}.{pid}-{started}-0{end}")


@pytest.fixture
def dead() -> int:
    """The number of a process that was."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write_and_a_live_ones_stays(tmp_path, kind):
    path, write = tmp_path / "14b.safetensors", replacing_folder if kind == "folder" else replacing
    killed, live, other = start(path, kind), start(path, kind), start(tmp_path / "b.safetensors", kind)
    try:
        for process in (killed, other):
            process.kill()
        time.sleep(0.2)  # not waited for yet: a zombie is dead too
        before = temporaries(tmp_path)
        assert len(before) == 3 and not path.exists()
        with write(path) as part:
            (part / "weights" if part.is_dir() else part).write_text("whole")
        left = temporaries(tmp_path)
        assert (
            len(left) == 2
            and any(f".{live.pid}-" in p.name for p in left)
            and any(f".{other.pid}-" in p.name for p in left)
        )
        assert ((path / "weights") if kind == "folder" else path).read_text() == "whole"
    finally:
        for process in (killed, live, other):
            process.kill()
            process.wait()


def test_only_own_kind_is_taken_away(tmp_path, dead):
    path, (pid, started) = tmp_path / "x", own()
    stay = [
        fake(path, "other-host-01234567", dead, 1),
        fake(path, host(), pid, started),
        fake(tmp_path / "x2", host(), dead, 1),
        tmp_path / "x.partial",
        tmp_path / "step-000003.bak",
        tmp_path / f".x.{dead}.partial",
        tmp_path / f".x.{host()}.{dead}-1-0.partial.bak",
        tmp_path / "x.part",
    ]
    # the number of a live process, used again
    go = [
        fake(path, host(), dead, 1),
        fake(path, host(), pid, started + 1),
    ]
    for file in (*stay, *go):
        file.write_text("kept")
    with replacing(path) as part:
        part.write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([path, *stay])
    assert all(file.read_text() == "kept" for file in stay)


def test_what_may_not_be_cleaned_is_no_error(tmp_path, dead, monkeypatch):
    path = tmp_path / "x"
    left = fake(path, host(), dead, 1)
    left.write_text("half")
    unlink = Path.unlink

    def refuse(self, *args, **kwargs):
        if self == left:
            raise PermissionError(13, "Permission denied")
        return unlink(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", refuse)
    with replacing(path) as part:
        part.write_text("new")
    monkeypatch.setattr(
        "os.scandir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with replacing(path) as part:
        part.write_text("newer")
    assert path.read_text() == "newer" and left.exists()


def test_a_folder_that_was_set_aside_by_a_dead_process_comes_back(tmp_path, dead):
    """Killed between its two renames, when nothing has the target's name."""
    path = tmp_path / "export"
    for end, text in ((".old", "old"), (PARTIAL, "new")):
        fake(path, host(), dead, 1, end).mkdir()
        (fake(path, host(), dead, 1, end) / "file").write_text(text)
    with pytest.raises(AptError, match="disk"), replacing_folder(path) as _:
        raise OSError("disk")
    assert [p.name for p in tmp_path.iterdir()] == ["export"] and (path / "file").read_text() == "old"


@pytest.mark.parametrize("write", [replacing, replacing_folder])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]
)
def test_a_failed_write_removes_its_own(tmp_path, write, error):
    with pytest.raises(AptError if isinstance(error, OSError) else type(error)), write(tmp_path / "x"):
        assert len(temporaries(tmp_path)) == 1
        raise error
    assert not list(tmp_path.iterdir()) and not atomic._open


def test_an_end_without_finally_can_remove_them_first(tmp_path):
    with pytest.raises(AptError, match="x could not be written"), replacing(tmp_path / "x"):
        remove_own()
        assert not list(tmp_path.iterdir())


def test_equal_bytes_can_keep_their_age(tmp_path):
    path = tmp_path / "x"
    path.write_text("same")
    os.utime(path, (1, 1))
    for text, age in (("same", 1), ("other", None)):
        with replacing(path, keep_equal=True) as part:
            part.write_text(text)
        assert path.read_text() == text and (path.stat().st_mtime == 1) == (age == 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_names_of_any_length(tmp_path):
    path = tmp_path / ("\u00e9" * 127)  # 254 bytes, as many as fit
    for text in ("one", "two"):
        with replacing(path) as part:
            part.write_text(text)
    assert path.read_text() == "two" and len(list(tmp_path.iterdir())) == 1
    with (
        pytest.raises(AptError, match="could not be written .File name too long"),
        replacing(tmp_path / ("e" * 256)),
    ):
        raise AssertionError("the work was begun")


def test_two_writers_of_one_name_in_one_process(tmp_path):
    with replacing(tmp_path / "x") as one:
        with replacing(tmp_path / "x") as two:
            one.write_text("one"), two.write_text("two")
        assert (tmp_path / "x").read_text() == "two"
    assert (tmp_path / "x").read_text() == "one"


def test_a_process_is_its_number_and_its_start(dead):
    pid, started = own()
    assert pid == os.getpid() and is_alive(pid, started) and is_alive(pid, 0)
    assert not is_alive(pid, started + 1) and not is_alive(dead, 1)
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    os.kill(stopped.pid, signal.SIGSTOP)
    assert is_alive(stopped.pid, 0)
    stopped.kill()
    stopped.wait()
