"""Write and identify a run's small files."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from apt_core.files.atomic import replacing


def write_json(path: Path, value) -> None:
    """Write JSON to `path` atomically: after a crash, either the old or the new file is there.

    Numbers that are not finite become null, because JSON has no word for them. Raises AptError as
    `apt_core.files.atomic.replacing` does.
    """
    with replacing(path, durable=True) as part, part.open("w", encoding="utf-8") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """The SHA-256 of what sha256sum prints for these files of a folder (lines "SHA-256  name"), in hex."""
    lines = "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
