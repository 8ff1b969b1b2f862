"""Writing small files whole or not at all."""

import json
import os
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Write JSON to `path` through a temporary file, so that a crash leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
