"""Digests, by which files are known again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """The SHA-256 of what sha256sum prints for these files of a folder (lines "SHA-256  name"), in hex."""
    lines = "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()
