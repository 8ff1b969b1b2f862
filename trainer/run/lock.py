"""One run at a time in a folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder
from trainer.files import write_json
from trainer.machines.distributed import World


class Lock:
    """A folder's lock, which lies beside it. The system releases it when the process that has taken it dies,
    however that happens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._note = (folder.with_name(f".{folder.name}.lock{end}") for end in ("", ".json"))
        self._lock = FileLock(str(self._path), thread_local=False)

    def take(self) -> None:
        """Raises AptError, with the name of the holder, when another process has it, and for a place that
        cannot be written.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AptError(
                f"{self.folder} is in use by another run ({self._holder()}): wait for its end, or give another --out."
            ) from None
        except OSError as error:
            raise AptError(
                f"{self._path} cannot be written ({error.strerror or error}): give a folder that can be written to."
            ) from None
        write_json(
            self._note,
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now().isoformat(" ", "seconds"),
            },
        )

    def take_together(self, world: World) -> None:
        """The main process makes the folder and takes its lock; all call alike, and all raise what it raises."""
        problem = None
        if world.main:
            try:
                make_folder(self.folder)
                self.take()
            except AptError as error:
                problem = str(error)
        if found := [sentence for sentence in world.gather(problem) if sentence]:
            raise AptError(found[0])

    def release(self) -> None:
        """Does nothing where it is not taken."""
        if self._lock.is_locked:
            self._note.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            holder = json.loads(self._note.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "whose name it has not written yet"


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """The folder is this run's own meanwhile. Raises AptError as `Lock.take_together`."""
    lock = Lock(folder)
    lock.take_together(world)
    try:
        yield
    finally:
        lock.release()
