"""Which process this is, and whether another one is still there. psutil is only loaded when it is asked
for."""

import hashlib
import os
import re
import socket
from functools import lru_cache
from pathlib import Path

FIRST_NAMESPACE = "pid:[4026531836]"  # Linux: outside any container; alone of all it outlasts a reboot


def host() -> str:
    """A name for what numbers processes here, of letters, digits and hyphens: the host, and inside a
    container the container."""
    name = socket.gethostname()
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = FIRST_NAMESPACE
    whole = name if space == FIRST_NAMESPACE else f"{name} {space}"
    mark = hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()
    return f"{re.sub('[^A-Za-z0-9-]', '-', name)[:20]}-{mark}"


def start_of(pid: int) -> int:
    """When a process began, in hundredths of a second or the system's own ticks: with its number it is one
    process, even after the number is used again. Raises OSError or psutil.Error where that cannot be seen."""
    if os.path.exists("/proc/self/stat"):  # counted from the boot: psutil's time moves when the clock is set
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(facts.rpartition(")")[2].split()[19])  # after a name that may hold anything
    import psutil

    return round(psutil.Process(pid).create_time() * 100)


@lru_cache(maxsize=1)
def _own(pid: int) -> int:
    return start_of(pid)


def own() -> tuple[int, int]:
    """This process's number and start, for `is_alive`; a start of 0 where the system does not tell."""
    pid = os.getpid()
    try:
        return pid, _own(pid)
    except Exception:  # psutil's own kinds
        return pid, 0


def is_alive(pid: int, start: int) -> bool:
    """Whether the process of this host with that number and start still runs, be it stopped. True where that
    cannot be told."""
    try:
        import psutil
    except ImportError:
        return True
    if not 0 < pid < 2**31:  # of a name that is not ours
        return True
    if not psutil.pid_exists(pid):
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and start in (0, start_of(pid))
    except (OSError, psutil.Error):  # somebody else's, who hides them
        return psutil.pid_exists(pid)
