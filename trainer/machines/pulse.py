"""Watches whether all processes of a run still answer. If one does not, all end, with one sentence that says
which one was lost.

Every process increments a counter in torch.distributed's store and watches the counters of the others, in
threads of its own, so that a long step, a collective or a compilation does not stop it. A counter that no
longer moves, by the watching process's own clock, belongs to a process that hangs, was stopped, or lost its
machine.
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

CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
LIMIT, VARIABLE = 40.0, "APT_PEER_SECONDS"
KEPT = "what is finished is kept, and the same command goes on from there"
DONE, FAILED, STOPPED = "done", "ended with an error", "was stopped by a signal"
BROKEN = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|remote process", re.IGNORECASE
)
_opened = 0  # how many runs this process has joined; each run has its own prefix in the store


def limit() -> float:
    """Seconds without an answer after which a process counts as lost; 0 turns watching off.

    Raises AptError if $APT_PEER_SECONDS is not such a number.
    """
    given = os.environ.get(VARIABLE, "")
    try:
        seconds = float(given or LIMIT)
        if not 0 <= seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise AptError(f"{VARIABLE} is {given!r}: give a number of seconds, or 0 to watch nobody.") from None
    return seconds


@dataclass
class Peer:
    """What this process knows about another one.

    moved: when its counter last moved, by this process's monotonic clock; at: the same by the time of day.
    count, left: its last counter, and how it said it was leaving ("" while it runs).
    """

    rank: int
    moved: float
    at: datetime
    name: str = ""
    host: str = ""
    pid: int = 0
    start: int = 0
    count: int = -1
    left: str = ""
    gone: int | None = None  # the round in which its process no longer existed
    work: float | None = None  # its CPU seconds when its counter was last found not to have moved

    def read(self, record: bytes, now: float) -> None:
        facts = json.loads(record)
        if (facts["count"], facts["left"]) != (self.count, self.left):
            self.moved, self.at, self.work = now, datetime.now(), None
        for key, value in facts.items():
            setattr(self, key, value)

    def __str__(self) -> str:
        return f"process {self.rank} ({self.name}, pid {self.pid})" if self.pid else f"process {self.rank}"


class Pulse:
    """This process's counter, and its watch over the others.

    store: a client used only here, because its calls block.
    seconds: see `limit`.
    keeper: rank of the process that the store ends with; None if torchrun keeps it.
    end: ends this process with an exit code.

    Set the attribute `kept` to a function that says what has been saved; the last sentence includes it.
    """

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
        """Tell the other processes that this one is leaving, because of `error` or (None) because it is
        done.
        """
        self._left = DONE if error is None or isinstance(error, SystemExit) else FAILED
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            self._left = STOPPED
        self._wait_for_rounds(2)  # a round that had already begun does not report it
        # The store ends with its keeper, so the others must have read this before the keeper leaves.
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
        """If an error was caused by the loss of another process, name that process instead of the error and
        end. Then this does not return: the watching thread finds out which process it was.
        """
        if isinstance(error, SystemExit):
            return
        self._broken = is_broken_connection(error)
        until = time.monotonic() + max(4.0, self.seconds * (1.5 if self._broken else 0.25))
        while time.monotonic() < until and not self._over.is_set():
            if not self._broken and not any(self._is_gone(peer) for peer in self.peers):
                return
            self._look.set()
            with suppress(Terminated):  # torchrun sends SIGTERM to all when one has died
                time.sleep(0.05)

    # The two threads

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
                    if (
                        now - self._answered > self.seconds * 3 / 8
                    ):  # the store was away: no counter could move
                        self._grace(now)
                    for peer, record in zip(known.values(), records):
                        peer.read(record, now)
                    self._answered, self._silent = now, False
                    self._rounds += 1
            except (
                Exception
            ):  # torch and the system raise many kinds; all mean that the store does not answer
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
                if now - last > 3 * tick + 0.5:  # this process itself was suspended, perhaps all of them
                    self._answered = now
                    self._grace(now)
                last = now
                if any(peer.left and peer.rank == self.keeper for peer in self.peers):
                    continue  # the store may have ended with it: others can no longer say that they leave
                lost = [peer for peer in self.peers if self._is_lost(peer, now)]
                silent = now - self._answered > self.seconds
                if silent and not lost:  # the end of the store may be noticed before that of its keeper
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
            return self._silent or self._rounds > peer.gone + 1  # a goodbye would have been read by then
        fresh = now - self._answered < self.seconds / 2
        return still > self.seconds and fresh and not self._is_busy(peer, now)

    def _is_gone(self, peer: Peer) -> bool:
        here = bool(peer.pid) and peer.host == self._host
        return here and not peer.left and not is_alive(peer.pid, peer.start)

    def _is_busy(self, peer: Peer, now: float) -> bool:
        """Whether a process on this host is computing although its counter does not move: one call can hold
        Python's global lock for long.
        """
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
        last = threading.Timer(10, self._end_process, [CODE])  # in case tidying hangs, on a lost disk say
        last.daemon = True
        last.start()
        if self._tells(lost):
            _say(f"error: {what}: {self.kept()}.")
        remove_own()
        last.cancel()
        self._over.set()
        self._end_process(CODE)

    def _tells(self, lost: list[Peer]) -> bool:
        """Whether this process is the one that prints the sentence: the first to ask the store or, if the
        store is gone, the one with the lowest rank.
        """
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
    """The started Pulse of this process in a run that torch.distributed has joined; None for a single process
    and for `seconds` 0. seconds: see `limit`.
    """
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
        warn(f"the other processes cannot be watched ({why}): if one dies, this one may wait for it.")
        return None
    prefix = f"apt/pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_opened}"
    keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    pulse = Pulse(rank, size, dist.PrefixStore(prefix, client), seconds, keeper)
    pulse.begin()
    return pulse


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, comes from a collective whose other side is gone."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # torch's DistError is a RuntimeError too
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
    """Print to stderr without Python's own stream: a thread that was stopped may hold its lock."""
    with suppress(OSError):
        os.write(
            2, (("\n" if os.isatty(2) else "") + readable(sentence) + "\n").encode(errors="backslashreplace")
        )
