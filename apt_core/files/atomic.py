"""Write files and folders whole or not at all. Everything that this project writes by name goes through this
module.

A new file is first written beside its target as `.NAME.HOST.PID-START-N.partial`, which is removed when
writing fails. A process that is killed leaves it behind; the next process on the same host that writes the
same target removes it. Nothing else is touched.
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
    """Give an empty file beside `path` to write to. When the block ends without an error it becomes `path`;
    otherwise it is removed. Missing parent folders are made.

    durable: wait until the file is on the disk, so that a power cut leaves either the old file or the new
    one. keep_equal: when the file at `path` already holds the same bytes, leave it as it is, with its age.
    also: other exceptions than OSError that mean that the file cannot be written. Raises AptError when it
    cannot be written.
    """
    path = Path(path)
    with _said(path, also):
        _prepare(path)
        with _temporary(path, PARTIAL) as part:
            part.touch(exist_ok=False)  # never write through a link that somebody left there
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors makes a file that only its owner can read
            if keep_equal and path.is_file() and filecmp.cmp(path, part, shallow=False):
                return
            if durable:
                _sync(part)
            os.replace(part, path)
    if durable:
        with suppress(OSError):  # sync the rename itself; not every system can sync a folder
            _sync(path.parent)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give a new folder beside `path` to fill. When the block ends without an error it replaces whatever was
    at `path`; otherwise it is removed.

    Raises AptError when the folder cannot be written.
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
    """Remove the unfinished files of this process, before an exit that skips `finally`. Never raises."""
    for temporary, (pid, target) in list(_open.items()):
        if pid == os.getpid():
            _remove(temporary, target)


def make_folder(path: Path) -> None:
    """Make `path` and its missing parents. Raises AptError when a file is in the way or the folder cannot be
    made.
    """
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
        path.lstat()  # refuses a name that is too long before the work and not after it
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
    """Remove temporary files of `path` whose process, on this host, has ended."""
    begin = re.escape(f".{_stem(path.name)}.{host()}.")
    name = re.compile(rf"{begin}(\d+)-(\d+)-\d+({PARTIAL}|{OLD})")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if (found := name.fullmatch(entry.name)) and not is_alive(int(found[1]), int(found[2])):
                _remove(Path(entry.path), path)


def _remove(temporary: Path, target: Path) -> None:
    with suppress(OSError):
        if temporary.name.endswith(OLD) and temporary.exists() and not target.exists():
            temporary.rename(target)  # it died between the two renames: this is the only whole copy
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
