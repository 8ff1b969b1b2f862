"""SIGTERM as an end like Ctrl-C: what is half-written goes, what is finished stays."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from apt_core.files.atomic import remove_own

CODE = 128 + signal.SIGTERM
PATIENCE = 5.0  # seconds that the main thread gets: a call into C++ that never returns hears of no signal


class Terminated(BaseException):
    """SIGTERM has come."""


def say_stopped() -> None:
    """What a stopped command says, once for all processes of a run."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError, ValueError):
            print(
                "stopped; what is finished is kept, and the same command goes on from there.",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def ended_by_sigterm(patience: float = PATIENCE) -> Iterator[None]:
    """SIGTERM raises Terminated in the block; where that does not leave it within `patience` seconds, the
    process ends with CODE, its unfinished files removed. A handler that is set meanwhile (as
    trainer.run.state.Run does, to save) is left to its work. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, over = False, threading.Event()

    def handle(*_) -> None:
        nonlocal told
        if not told:  # a second one would break off the tidying
            told = True
            raise Terminated

    def watch(reader: int) -> None:
        with suppress(OSError), os.fdopen(reader, "rb", buffering=0):
            while sent := os.read(reader, 64):
                ours = signal.SIGTERM in sent and signal.getsignal(signal.SIGTERM) is handle
                if ours and not over.wait(patience):
                    remove_own()
                    say_stopped()
                    os._exit(CODE)

    def forked() -> None:  # the child's signals are not ours
        if not over.is_set() and signal.getsignal(signal.SIGTERM) is handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    reader, writer = os.pipe()
    with suppress(AttributeError, OSError):  # Windows
        os.set_blocking(writer, False)
    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except (ValueError, OSError):  # Windows may want a socket; the main thread hears of it all the same
        before = None
    if before is not None:
        threading.Thread(target=watch, args=(reader,), daemon=True, name="sigterm").start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forked)
    handler = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, handler)
        if before is not None:
            signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads its end
        if before is None:
            os.close(reader)
