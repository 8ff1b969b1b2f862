"""Identify this process, and check whether another one still runs. psutil is loaded only when needed."""

import hashlib
import os
import re
import socket
from functools import lru_cache
from pathlib import Path

FIRST_NAMESPACE = "pid:[4026531836]"  # Linux: outside any container; no other keeps its number over a reboot


def host() -> str:
    """A name for the system that numbers the processes here, made of letters, digits and hyphens: the host,
    or inside a container the container.
    """
    name = socket.gethostname()
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = FIRST_NAMESPACE
    whole = name if space == FIRST_NAMESPACE else f"{name} {space}"
    mark = hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()
    return f"{re.sub('[^A-Za-z0-9-]', '-', name)[:20]}-{mark}"


def start_of(pid: int) -> int:
    """When a process began, in hundredths of a second or in the system's own ticks. Number and start together
    identify one process, even after the number is used again. Raises OSError or psutil.Error when the start
    cannot be read.
    """
    if os.path.exists("/proc/self/stat"):  # ticks since boot; psutil's time changes when the clock is set
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(facts.rpartition(")")[2].split()[19])  # the name before it may contain anything
    import psutil

    return round(psutil.Process(pid).create_time() * 100)


@lru_cache(maxsize=1)
def _own(pid: int) -> int:
    return start_of(pid)


def own() -> tuple[int, int]:
    """This process's number and start, for `is_alive`. The start is 0 when the system does not tell."""
    pid = os.getpid()
    try:
        return pid, _own(pid)
    except Exception:  # psutil has its own exceptions
        return pid, 0


def is_alive(pid: int, start: int) -> bool:
    """Whether the process of this host with that number and start still exists, even if it is stopped. True
    when this cannot be told.
    """
    try:
        import psutil
    except ImportError:
        return True
    if not 0 < pid < 2**31:  # from a name that is not ours
        return True
    if not psutil.pid_exists(pid):
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and start in (0, start_of(pid))
    except (OSError, psutil.Error):  # another user's process that is hidden from us
        return psutil.pid_exists(pid)
