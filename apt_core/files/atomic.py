"""Files and folders that appear whole or not at all. Everything that this project writes by name goes through
here.

What is being written lies beside its target as `.NAME.HOST.PID-START-N.partial`, and goes when the writing
fails. A process that is killed leaves it; whoever writes the same target next, on the same host, takes it
away. Nothing else is touched.
"""

import filecmp
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AptError
from .processes import host, is_alive, own

PARTIAL, OLD = ".partial", ".old"
LONGEST = 150  # bytes of a name that a temporary one repeats; systems allow 255 for the whole
_numbers = itertools.count()
_open: dict[Path, tuple[int, Path]] = {}  # by temporary: the process that writes it, and its target


@contextmanager
def replacing(
    path: str | Path,
    *,
    durable: bool = False,
    keep_equal: bool = False,
    also: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """An empty file beside `path` to write to, which becomes `path` when all went well and is gone when not.
    Parent folders are made.

    durable: wait until it is on the disk, so that a power cut leaves the old file or the new one. keep_equal:
    a file that holds the same bytes stays as it is, with its age. also: what else than an OSError means that
    it cannot be written. Raises AptError for a place that cannot be written.
    """
    path = Path(path)
    with _said(path, also):
        _prepare(path)
        with _temporary(path, PARTIAL) as part:
            part.touch(exist_ok=False)  # a link that somebody left there would be written through
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors leaves a file that only its owner can read
            if keep_equal and path.is_file() and filecmp.cmp(path, part, shallow=False):
                return
            if durable:
                _sync(part)
            os.replace(part, path)
    if durable:
        with suppress(OSError):  # the rename itself: not every system lets a folder be synced
            _sync(path.parent)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside `path` to fill, which becomes `path` when all went well, in the place of what was
    there, and is gone when not.

    Raises AptError for a place that cannot be written.
    """
    path = Path(path)
    with _said(path):
        _prepare(path)
        with _temporary(path, PARTIAL) as new, _temporary(path, OLD) as old:
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)


def remove_own() -> None:
    """Take away what this process is writing: before an end that leaves no `finally`. Raises nothing."""
    for temporary, (pid, target) in list(_open.items()):
        if pid == os.getpid():
            _remove(temporary, target)


def make_folder(path: Path) -> None:
    """Make `path` and its parents where they are missing. Raises AptError when a file is in the way or the
    place cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        why = "it or a parent of it is a file"
        raise AptError(f"{path} cannot be made, because {why}: give another folder.") from None
    except OSError as error:
        why = error.strerror or error
        raise AptError(f"{path} cannot be made ({why}): give a folder that can be written to.") from None


@contextmanager
def _said(path: Path, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    try:
        yield
    except (OSError, *also) as error:
        why, remedy = getattr(error, "strerror", None) or error, "check the folder and its free space"
        raise AptError(
            f"{path} could not be written ({why}): {remedy}; nothing there has changed."
        ) from error


def _prepare(path: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # a name that is too long is refused before the work, not after it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        why = f"{path.parent} or a parent of it is a file"
        raise AptError(f"{path} could not be written, because {why}: give another folder.") from None
    _remove_leftovers(path)


@contextmanager
def _temporary(path: Path, end: str) -> Iterator[Path]:
    pid, start = own()
    temporary = path.with_name(f".{_stem(path.name)}.{host()}.{pid}-{start}-{next(_numbers)}{end}")
    _open[temporary] = pid, path
    try:
        _remove(temporary, path)
        yield temporary
    finally:
        _remove(temporary, path)
        del _open[temporary]


def _stem(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= LONGEST else hashlib.blake2b(raw, digest_size=16).hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Temporaries of `path` whose process, on this host, is dead."""
    begin = re.escape(f".{_stem(path.name)}.{host()}.")
    name = re.compile(rf"{begin}(\d+)-(\d+)-\d+({PARTIAL}|{OLD})")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if (found := name.fullmatch(entry.name)) and not is_alive(int(found[1]), int(found[2])):
                _remove(Path(entry.path), path)


def _remove(temporary: Path, target: Path) -> None:
    with suppress(OSError):
        if temporary.name.endswith(OLD) and temporary.exists() and not target.exists():
            temporary.rename(target)  # between the two renames: the only whole one
        elif temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
