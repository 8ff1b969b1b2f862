"""A lock on a run's folder, so that only one run at a time works in it."""

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
from apt_core.files.jsonfile import write_json
from trainer.machines.distributed import World


class Lock:
    """The lock of a folder: a file beside it. The system releases the lock when the process that holds it
    ends, for whatever reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._note = (folder.with_name(f".{folder.name}.lock{end}") for end in ("", ".json"))
        self._lock = FileLock(str(self._path), thread_local=False)

    def take(self) -> None:
        """Take the lock. Raises AptError if another process holds it, and says which one, or if the lock file
        cannot be written.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AptError(
                f"{self.folder} is in use by another run ({self._holder()}): wait until it ends, or give "
                "another --out."
            ) from None
        except OSError as error:
            raise AptError(
                f"{self._path} cannot be written ({error.strerror or error}): "
                "give a folder that can be written to."
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
        """The main process creates the folder and takes its lock. All processes must call this together; if
        it fails, all raise the same AptError.
        """
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
        """Release the lock, if it is taken."""
        if self._lock.is_locked:
            self._note.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            holder = json.loads(self._note.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it has not written its name yet"


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """Hold the folder's lock inside the block. Raises AptError as `Lock.take_together` does."""
    lock = Lock(folder)
    lock.take_together(world)
    try:
        yield
    finally:
        lock.release()
