"""SIGTERM: what is half-written goes, in time, and the sentence is that of Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.machines.ending import CODE, Terminated, ended_by_sigterm

ROOT = Path(__file__).parents[2]


def test_it_leaves_the_block_once_and_the_old_handler_comes_back():
    before, left = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Terminated), ended_by_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # does not break off the tidying
            time.sleep(0.1)
            left.append(1)
    assert left == [1] and signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


BEGIN = f"""
import ctypes, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from apt_core.files.atomic import replacing
from trainer.machines.ending import ended_by_sigterm
with ended_by_sigterm(patience=0.5), replacing("x") as part:
    part.write_text("half")
    print("writing", flush=True)
"""
# The signal comes a second later, when the call has surely begun: before, the main thread would hear of it.
BLOCKED = (
    BEGIN
    + """
    import threading
    lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    take(lock)
    threading.Timer(1, os.kill, [os.getpid(), 15]).start()
    take(lock)
"""
)
FORKED = (
    BEGIN
    + """
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(1)
    time.sleep(0.2)
    os.kill(child, 15)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
    time.sleep(1)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a call into C that hears no signal")
def test_a_call_that_never_returns_ends_too(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    said = process.communicate(timeout=30)[1]
    assert process.returncode == CODE == 143, said
    assert said == "stopped; what is finished is kept, and the same command goes on from there.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_childs_signal_is_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


GENERATE = """
import sys, time
sys.path.insert(0, {root!r})
import apt_core.files.media_write as media
def slow(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(60)
class Frames:
    from_ndarray = staticmethod(slow)
media.av.VideoFrame = Frames
from trainer.__main__ import app
app()
"""


def test_generate_leaves_nothing(tmp_path):
    command = [
        sys.executable,
        "-c",
        GENERATE.format(root=str(ROOT)),
        "generate",
        "mini",
        "a red circle",
        "--out",
        "samples",
        "--device",
        "cpu",
    ]
    command += ["--vae", "mini", "--text-encoder", "mini", "--height", "48", "--width", "48", "--frames", "5"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line == "writing\n":
            break
    assert [path.suffix for path in (tmp_path / "samples").iterdir()] == [".partial"]
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 143, said
    assert (
        "stopped; what is finished is kept, and the same command goes on from there." in said
        and "Traceback" not in said
    )
    assert not list((tmp_path / "samples").iterdir())
