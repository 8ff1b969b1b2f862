"""A file of prompts: text with one prompt a line."""

from pathlib import Path

from ..errors import AptError


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty. Raises AptError for a file that is not there, not text or
    empty.
    """
    try:
        # no other character ends a line of a prompt
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError):
        raise AptError(f"{path} cannot be read as UTF-8 text: give a file with one prompt a line.") from None
    if not any(lines):
        raise AptError(f"{path} holds no prompt: write one a line.")
    return [line for line in lines if line]
