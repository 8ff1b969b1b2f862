"""A process that dies or hangs ends the others soon, in one sentence; one that is only slow does not."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from layouts import start_workers
from pulse_worker import main

import trainer.machines.pulse
from apt_core.errors import AptError
from trainer.machines.ending import Terminated
from trainer.machines.pulse import CODE, Pulse, is_broken_connection, limit

ROOT = Path(__file__).parents[3]
SECONDS = 4.0
SAVED = r"step-\d{{6}} in \S+states is saved, and the same command goes on from there\.\n"
GONE = r"error: process {rank} \(\S+, pid {pid}\) {what} since \d\d:\d\d:\d\d: " + SAVED


def wait_for(found, seconds: float = 180):
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


def saved(folder: Path) -> int:
    """The number of process 1 of a run that has saved a state; 0 before."""
    ready = list((folder / "states").glob("step-??????/run.json")) and (folder / "1.pid").exists()
    return int((folder / "1.pid").read_text() or 0) if ready else 0


@pytest.mark.parametrize("kind, what", [("SIGKILL", "is gone"), ("SIGSTOP", "has not answered")])
def test_under_torchrun_a_lost_process_is_one_sentence(tmp_path, kind, what):
    environment = os.environ | {"PYTHONPATH": str(ROOT), trainer.machines.pulse.VARIABLE: str(SECONDS)}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--log-dir", str(tmp_path / "log"), "--redirects", "3"]
    command += [str(Path(__file__).with_name("pulse_worker.py")), str(tmp_path / "states")]
    with (tmp_path / "torchrun").open("w") as file:
        run = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    pid = wait_for(lambda: saved(tmp_path) or run.poll(), 120)
    (ours,) = (tmp_path / "log").glob("*/attempt_0/0/stderr.log")
    started = time.monotonic()
    os.kill(pid, getattr(signal, kind))
    wait_for(lambda: without_warnings(ours))
    took = time.monotonic() - started
    assert took < 1.5 * SECONDS + 3 and (kind == "SIGKILL" or took > 0.8 * SECONDS)
    assert run.wait(180) == 1
    said = without_warnings(ours)
    assert re.fullmatch(GONE.format(rank=1, pid=pid, what=what), said), said
    if kind == "SIGSTOP":  # of the killed one torchrun has the signal
        assert re.search(rf"exitcode +: {CODE} ", (tmp_path / "torchrun").read_text())


def without_warnings(path: Path) -> str:
    """What a process said, less the lines of torch's own log."""
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"\[rank\d\]:\[W|\[W|\[Gloo\]", line))


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two processes as under SLURM, where the first one keeps the store, and the files of what they say."""
    monkeypatch.setenv(trainer.machines.pulse.VARIABLE, str(SECONDS))
    monkeypatch.syspath_prepend(str(ROOT))
    started = []

    def start(*arguments: str) -> list:
        started.extend(start_workers(2, run_worker, [str(tmp_path / "states"), *arguments], tmp_path))
        return started

    yield start
    for worker in started:
        worker.kill()
        worker.join()


def run_worker(arguments: list[str], folder: Path) -> None:
    os.environ[trainer.machines.pulse.VARIABLE] = str(SECONDS)  # the server that forks it has another's
    main(arguments, folder / f"{os.environ['RANK']}.log")


def test_the_death_of_the_process_that_keeps_the_store(tmp_path, pair):
    first, second = pair()
    wait_for(lambda: saved(tmp_path))
    time.sleep(SECONDS / 2)  # else the second may not know yet who the first is, and names the store alone
    first.kill()
    second.join(180)
    assert second.exitcode == CODE
    said = without_warnings(tmp_path / "1.log")
    assert re.fullmatch(GONE.format(rank=0, pid=first.pid, what="is gone"), said), said


def test_all_stopped_together_and_then_busy_without_a_beat_goes_on_to_the_end(tmp_path, pair):
    """The second process holds Python's lock for three times the limit in one step."""
    workers = pair("--updates", "60", "--busy", "3")
    pid = wait_for(lambda: saved(tmp_path))
    time.sleep(0.5)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(1.5 * SECONDS)
    for worker in workers:
        os.kill(worker.pid, signal.SIGCONT)
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0], (tmp_path / "0.log").read_text() + (
        tmp_path / "1.log"
    ).read_text()
    assert pid and "sum 120.0" in (tmp_path / "0.log").read_text()


class Watched:
    """Pulses of one process that stand for processes of a run, with what would have ended them."""

    def __init__(self, size: int, keeper: int | None = None):
        self.store, self.ended = dist.HashStore(), []
        self.all = [
            Pulse(
                rank,
                size,
                self.store,
                0.8,
                keeper,
                end=lambda code, rank=rank: self.ended.append((rank, code)),
            )
            for rank in range(size)
        ]

    def begin(self) -> None:
        for pulse in self.all:
            pulse.begin()
        wait_for(lambda: all(peer.pid for pulse in self.all for peer in pulse.peers))


@pytest.fixture
def watched():
    made = []

    def make(*args) -> Watched:
        made.append(Watched(*args))
        return made[-1]

    yield make
    for run in made:
        for pulse in run.all:
            pulse._over.set()


def test_a_process_of_another_host_that_stands_still_is_named_once(watched, capfd):
    run = watched(3)
    run.all[2]._host = "elsewhere-00000000"  # of which no process can be looked at
    run.begin()
    run.all[2]._over.set()  # both threads end, without a word
    wait_for(lambda: len(run.ended) == 2)
    said = capfd.readouterr().err
    assert sorted(run.ended) == [(0, CODE), (1, CODE)] and len(said.splitlines()) == 1
    assert re.fullmatch(
        r"error: process 2 \(\S+, pid \d+\) has not answered since \S+: "
        + re.escape(trainer.machines.pulse.KEPT)
        + r"\.\n",
        said,
    )


def test_a_clock_that_jumped_is_no_silence(watched, monkeypatch):
    """As after a stop of all processes, here on different machines."""
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr("trainer.machines.pulse.time", clock)
    run = watched(2)
    for pulse in run.all:
        pulse._host = f"host{pulse.rank}"
    run.begin()
    ahead[0] = 100.0
    time.sleep(1.5 * run.all[0].seconds)
    assert not run.ended
    run.all[1]._over.set()
    wait_for(lambda: run.ended == [(0, CODE)])


def test_who_leaves_is_not_waited_for(watched, capfd):
    run = watched(3)
    for pulse in run.all:
        pulse._host = f"host{pulse.rank}"
    run.begin()
    run.all[1].leave(None)
    run.all[2].leave(SystemExit(0))
    time.sleep(2 * run.all[0].seconds)
    assert not run.ended and not capfd.readouterr().err


@pytest.mark.parametrize(
    "error, says", [(ValueError("x"), "ended with an error at"), (Terminated(), "was stopped by a signal at")]
)
def test_an_end_with_an_error_is_told_from_silence(watched, capfd, error, says):
    run = watched(2)
    run.begin()
    run.all[1].leave(error)
    run.all[0].explain(RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1"))
    assert run.ended == [(0, CODE)] and says in capfd.readouterr().err


def test_the_store_goes_with_its_keeper_once_the_others_know(watched):
    run = watched(2, 0)
    run.begin()
    run.all[0].leave(None)
    assert run.all[1].peers[0].left == "done"
    run.all[1]._store = None  # gone
    time.sleep(2 * run.all[1].seconds)
    assert not run.ended


def test_a_store_that_never_answers_again_is_said(watched, capfd, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    run = watched(2)
    for pulse in run.all:
        pulse._host = f"host{pulse.rank}"
    run.begin()
    for pulse in run.all:
        pulse._store = None
    wait_for(lambda: len(run.ended) == 2)
    said = capfd.readouterr().err
    assert said.count("error: the store of the processes at node7:29500 has not answered for 0.8 s: ") == 1


def test_which_errors_are_another_process_s():
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")
    behind = AptError("step-000001 cannot be loaded")
    behind.__cause__ = lost
    assert is_broken_connection(lost) and is_broken_connection(behind)
    assert not is_broken_connection(AptError("no such file")) and not is_broken_connection(
        RuntimeError("shapes differ")
    )


def test_the_limit_is_seconds(monkeypatch):
    monkeypatch.delenv(trainer.machines.pulse.VARIABLE, raising=False)
    assert limit() == 40
    monkeypatch.setenv(trainer.machines.pulse.VARIABLE, "0")
    assert limit() == 0
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(trainer.machines.pulse.VARIABLE, wrong)
        with pytest.raises(
            AptError, match=f"APT_PEER_SECONDS is '{wrong}': give a number of seconds, or 0 to watch nobody"
        ):
            limit()


def test_a_store_that_ends_before_its_keeper_is_found_gone_is_said_by_who_is_left(
    tmp_path, monkeypatch, capfd
):
    """Where the keeper and its store are gone, nobody is left to wait for: the next one speaks."""
    watched = Watched(2, keeper=0)
    one = watched.all[1]
    monkeypatch.setattr(one, "_store", SimpleNamespace(add=lambda *_: 1 / 0))
    assert one._tells([]) and one._tells([one.peers[0]])
