"""Writing small files whole or not at all, and making the folders that they go to."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_core.errors import AptError


def make_folder(path: Path) -> None:
    """Make `path` and its parents where they are missing. Raises AptError when a file is in the way or the place cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AptError(f"{path} cannot be made, because it or a parent of it is a file: give another folder.") from None
    except OSError as error:
        raise AptError(f"{path} cannot be made ({error.strerror}): give a folder that can be written to.") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` when all went well and is gone when not. Parent folders are made.

    Raises AptError for a place that cannot be written.
    """
    part = path.with_name(path.name + ".part")
    make_folder(path.parent)
    try:
        part.unlink(missing_ok=True)
        part.touch(exist_ok=False)  # a link that somebody left there would be written through
        yield part
        os.replace(part, path)
    except OSError as error:
        raise AptError(f"{path} could not be written ({error.strerror or error}): check the folder and its free space.") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write JSON to `path`, so that a crash leaves the old file or the new one. What is not finite becomes null, which JSON has. Raises AptError as
    `replacing` does."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
