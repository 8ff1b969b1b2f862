"""Small JSON files: read whatever they may hold, and write them whole or not at all."""

import json
import math
from pathlib import Path

from ..errors import AptError
from .atomic import replacing


def read_object(path: Path, remedy: str) -> dict:
    """The JSON object in a file. remedy: what the user can do; it ends the error message. Raises AptError
    when the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AptError(f"{path} does not exist: {remedy}.") from None
    except OSError as error:
        raise AptError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from None
    except (
        ValueError,
        RecursionError,
    ):  # not JSON, not UTF-8, numbers of thousands of digits, thousands of brackets
        value = None
    if not isinstance(value, dict):
        raise AptError(f"{path} is damaged: {remedy}.")
    return value


def write_json(path: Path, value) -> None:
    """Write JSON to `path` atomically: after a crash, either the old or the new file is there.

    Numbers that are not finite become null, because JSON has no word for them. Raises AptError as
    `apt_core.files.atomic.replacing` does.
    """
    with replacing(path, durable=True) as part, part.open("w", encoding="utf-8") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
