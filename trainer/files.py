"""Small files of a run."""

import hashlib
import json
import math
from pathlib import Path

from apt_core.files.atomic import replacing


def write_json(path: Path, value) -> None:
    """Write JSON to `path`, so that a crash leaves the old file or the new one. What is not finite becomes
    null, which JSON has. Raises AptError as `apt_core.files.atomic.replacing` does.
    """
    with replacing(path, durable=True) as part, part.open("w", encoding="utf-8") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)


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
