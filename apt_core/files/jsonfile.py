"""Read small JSON files that may come from anywhere."""

import json
from pathlib import Path

from ..errors import AptError


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
