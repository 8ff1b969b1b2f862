"""SIGTERM ends a command as Ctrl-C does: half-written files are removed, finished ones stay."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from apt_core.files.atomic import remove_own

CODE = 128 + signal.SIGTERM
PATIENCE = 5.0  # seconds for the main thread to react: inside a long call into C++ Python handles no signal


class Terminated(BaseException):
    """The process has received SIGTERM."""


def say_stopped() -> None:
    """Print what a stopped command says. Of several processes only the one of rank 0 prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError, ValueError):
            print(
                "stopped; what is finished is kept, and the same command goes on from there.",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def ended_by_sigterm(patience: float = PATIENCE) -> Iterator[None]:
    """Inside the block, SIGTERM raises Terminated. If the block is not left within `patience` seconds after
    that, the unfinished files are removed and the process exits with CODE. A handler that is installed inside
    the block takes precedence (trainer.run.state.Run installs one, to save). Outside the main thread this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, over = False, threading.Event()

    def handle(*_) -> None:
        nonlocal told
        if not told:  # a second signal would interrupt the clean-up
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

    def forked() -> None:  # a forked child must not handle signals as its parent does
        if not over.is_set() and signal.getsignal(signal.SIGTERM) is handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    reader, writer = os.pipe()
    with suppress(AttributeError, OSError):  # Windows
        os.set_blocking(writer, False)
    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except (ValueError, OSError):  # Windows may need a socket here; the main thread still gets the signal
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
        os.close(writer)  # the thread reads end of file and ends
        if before is None:
            os.close(reader)
