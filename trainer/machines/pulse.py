"""Whether the other processes of a run still answer; where one does not, the end of them all, in one
sentence.

Each process counts up in the store that torch.distributed began with, and watches the others' counts, from
threads of its own: a long step, a collective or a compilation changes nothing. A count that stands still by
the watcher's own clock is a process that hangs, was stopped, or whose machine is gone.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import psutil
import torch.distributed as dist

from apt_core.errors import AptError, readable
from apt_core.files.atomic import remove_own
from apt_core.files.processes import host, is_alive, own
from trainer.aside import warn
from trainer.machines.ending import Terminated

CODE = 75  # what sysexits.h calls a failure that may pass: try again
LIMIT, VARIABLE = 40.0, "APT_PEER_SECONDS"
KEPT = "what is finished is kept, and the same command goes on from there"
DONE, FAILED, STOPPED = "done", "ended with an error", "was stopped by a signal"
BROKEN = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|remote process", re.IGNORECASE
)
_opened = 0  # how many runs this process has joined: each counts under a name of its own


def limit() -> float:
    """Seconds without an answer after which a process counts as lost; 0: nobody is watched.

    Raises AptError when $APT_PEER_SECONDS is not that.
    """
    given = os.environ.get(VARIABLE, "")
    try:
        seconds = float(given or LIMIT)
        if not 0 <= seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise AptError(f"{VARIABLE} is {given!r}: give seconds, or 0 to watch nobody.") from None
    return seconds


@dataclass
class Peer:
    """Another process, as far as it is known. moved: when its count last did, by this process's clock; at: by
    the day's."""

    rank: int
    moved: float
    at: datetime
    name: str = ""
    host: str = ""
    pid: int = 0
    start: int = 0
    count: int = -1
    left: str = ""
    gone: int | None = None  # the round in which its process was no longer there
    work: float | None = None  # seconds of processor when its count was last found standing

    def read(self, record: bytes, now: float) -> None:
        facts = json.loads(record)
        if (facts["count"], facts["left"]) != (self.count, self.left):
            self.moved, self.at, self.work = now, datetime.now(), None
        for key, value in facts.items():
            setattr(self, key, value)

    def __str__(self) -> str:
        return f"process {self.rank} ({self.name}, pid {self.pid})" if self.pid else f"process {self.rank}"


class Pulse:
    """This process's count and its watch on the others. `kept()` says what is saved, for the sentence; set it
    when there is something better to say. store: of its own, as its calls block; keeper: the process that it
    ends with, None for torchrun's. end: what ends the process."""

    def __init__(
        self,
        rank: int,
        size: int,
        store,
        seconds: float,
        keeper: int | None = None,
        end: Callable[[int], None] = os._exit,
    ):
        now = time.monotonic()
        self.rank, self.seconds, self.keeper, self.kept = rank, seconds, keeper, lambda: KEPT
        self.peers = [Peer(other, now, datetime.now()) for other in range(size) if other != rank]
        self._store, self._end_process, self._host = store, end, host()
        self._answered, self._rounds, self._silent = now, 0, False
        self._count, self._left, self._broken = 0, "", False
        self._wake, self._look, self._over = (threading.Event() for _ in range(3))
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start both threads."""
        for work in (self._beat, self._judge):
            threading.Thread(target=work, daemon=True, name=f"pulse{work.__name__}").start()

    def leave(self, error: BaseException | None) -> None:
        """The others need not wait for this process any more, as `error` or None ends it."""
        self._left = DONE if error is None or isinstance(error, SystemExit) else FAILED
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            self._left = STOPPED
        self._wait_for_rounds(2)  # one may have begun before
        # The store ends with its keeper: the others have to hear of this before.
        until, counts = time.monotonic() + self.seconds, {peer.rank: peer.count for peer in self.peers}
        while self.rank == self.keeper and time.monotonic() < until and not self._silent:
            if all(peer.left or peer.count > counts[peer.rank] + 1 for peer in self.peers):
                break
            self._wake.set()
            time.sleep(0.05)
        self._over.set()
        self._wake.set()
        self._look.set()

    def explain(self, error: BaseException) -> None:
        """Does not return where the loss of another process stands behind an error: it is said in the error's
        place. Who it is the thread finds out that judges."""
        if isinstance(error, SystemExit):
            return
        self._broken = is_broken_connection(error)
        until = time.monotonic() + max(4.0, self.seconds * (1.5 if self._broken else 0.25))
        while time.monotonic() < until and not self._over.is_set():
            if not self._broken and not any(self._is_gone(peer) for peer in self.peers):
                return
            self._look.set()
            with suppress(Terminated):  # of torchrun, which ends all when one has died
                time.sleep(0.05)

    # What the threads do

    def _beat(self) -> None:
        known = {}
        while not self._over.is_set():
            try:
                self._count += 1
                self._store.set(str(self.rank), json.dumps(self._record()))
                for peer in self.peers:
                    if peer.rank not in known and self._store.check([str(peer.rank)]):
                        known[peer.rank] = peer
                records = self._store.multi_get([str(rank) for rank in known]) if known else []
                now = time.monotonic()
                with self._lock:
                    if now - self._answered > self.seconds * 3 / 8:  # nobody could count
                        self._grace(now)
                    for peer, record in zip(known.values(), records):
                        peer.read(record, now)
                    self._answered, self._silent = now, False
                    self._rounds += 1
            except Exception:  # torch's and the system's own kinds: all mean that nobody answers
                self._silent = True
            self._wake.wait(self.seconds / 8)
            self._wake.clear()

    def _record(self) -> dict:
        pid, start = own()
        facts = {"count": self._count, "left": self._left, "name": socket.gethostname(), "host": self._host}
        return facts | {"pid": pid, "start": start}

    def _judge(self) -> None:
        tick, last = self.seconds / 20, time.monotonic()
        while not self._over.is_set():
            self._look.wait(tick)
            self._look.clear()
            now = time.monotonic()
            with self._lock:
                if now - last > 3 * tick + 0.5:  # this process stood still itself, perhaps with all others
                    self._answered = now
                    self._grace(now)
                last = now
                if any(peer.left and peer.rank == self.keeper for peer in self.peers):
                    continue  # the store may be gone with it, and who leaves from here on cannot say so
                lost = [peer for peer in self.peers if self._is_lost(peer, now)]
                silent = now - self._answered > self.seconds
                if silent and not lost:  # the store's own end may be noticed before that of its keeper
                    lost = [peer for peer in self.peers if self._is_gone(peer)]
            if lost:
                self._end(lost, _what(lost[0]) + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
            elif silent:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                for_long = f"has not answered for {self.seconds:g} s"
                self._end([], f"the store of the processes at {where} {for_long}")

    def _grace(self, now: float) -> None:
        for peer in self.peers:
            if not peer.left:
                peer.moved = now

    def _is_lost(self, peer: Peer, now: float) -> bool:
        still = now - peer.moved
        if peer.left:
            return peer.left != DONE and (self._broken or still > self.seconds)
        if self._is_gone(peer):
            if peer.gone is None:
                peer.gone = self._rounds
            self._wake.set()
            return self._silent or self._rounds > peer.gone + 1  # its last word would have been read
        fresh = now - self._answered < self.seconds / 2
        return still > self.seconds and fresh and not self._is_busy(peer, now)

    def _is_gone(self, peer: Peer) -> bool:
        here = bool(peer.pid) and peer.host == self._host
        return here and not peer.left and not is_alive(peer.pid, peer.start)

    def _is_busy(self, peer: Peer, now: float) -> bool:
        """Whether a process of this host computes without letting its threads count: one call may hold
        Python's lock."""
        if not peer.pid or peer.host != self._host:
            return False
        try:
            process = psutil.Process(peer.pid)
            if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                return False
            before, peer.work = peer.work, sum(process.cpu_times()[:2])
        except (OSError, psutil.Error):
            return False
        wait = self.seconds / 4
        if before is None or peer.work - before > 0.1 * wait:
            peer.moved = now - self.seconds + wait
            return True
        return False

    def _wait_for_rounds(self, count: int) -> None:
        target, until = self._rounds + count, time.monotonic() + self.seconds / 4
        while self._rounds < target and time.monotonic() < until and not self._silent:
            self._wake.set()
            time.sleep(0.01)

    def _end(self, lost: list[Peer], what: str) -> None:
        if self._over.is_set():
            return
        last = threading.Timer(10, self._end_process, [CODE])  # a folder that hangs too, for one
        last.daemon = True
        last.start()
        if self._tells(lost):
            _say(f"error: {what}: {self.kept()}.")
        remove_own()
        last.cancel()
        self._over.set()
        self._end_process(CODE)

    def _tells(self, lost: list[Peer]) -> bool:
        """Whether it is this process that says so: the first to ask the store, or the lowest where that is
        gone."""
        first = []

        def ask() -> None:
            with suppress(Exception):
                first.append(self._store.add("told", 1) == 1)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(min(2.0, self.seconds))
        left = {peer.rank for peer in self.peers if peer.left} | {peer.rank for peer in lost} | {self.keeper}
        lower = any(peer.rank < self.rank and peer.rank not in left for peer in self.peers)
        return first[0] if first else not lower


def open_pulse(rank: int, size: int, seconds: float) -> Pulse | None:
    """The pulse of a run that torch.distributed has joined by its environment; None where nobody is watched.
    seconds: of `limit`."""
    global _opened
    if size == 1 or seconds == 0:
        return None
    _opened += 1
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        client = dist.TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )
    except (RuntimeError, ValueError) as error:
        why = _first_line(error)
        warn(f"the other processes cannot be watched ({why}): one that dies may be waited for.")
        return None
    prefix = f"apt/pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_opened}"
    keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    pulse = Pulse(rank, size, dist.PrefixStore(prefix, client), seconds, keeper)
    pulse.begin()
    return pulse


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is a collective's whose other side has gone."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # also torch's DistError
        if isinstance(error, (RuntimeError, AptError)) and BROKEN.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _what(peer: Peer) -> str:
    at = f"{peer.at:%H:%M:%S}"
    if peer.left:
        return f"{peer} {peer.left} at {at}"
    return f"{peer} {'is gone' if peer.gone is not None else 'has not answered'} since {at}"


def _first_line(error: BaseException) -> str:
    return readable(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)


def _say(sentence: str) -> None:
    """Past Python's own streams: the thread that has stopped may hold them."""
    with suppress(OSError):
        os.write(
            2, (("\n" if os.isatty(2) else "") + readable(sentence) + "\n").encode(errors="backslashreplace")
        )
