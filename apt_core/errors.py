"""The exceptions that a user's own input may raise: one, and two kinds of it that a caller may tell apart."""

from collections.abc import Sequence

LONGEST = 1000


class AptError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, with the name and value, and what would do. Values come from
    files and people: control characters in them are shown as escapes, and what is too long to read is cut in
    the middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(readable(message))


class OutOfMemory(AptError):
    """What was asked for does not fit the device, with everything given up that can be: a smaller size or
    fewer frames may fit.
    """


class NotFinite(AptError):
    """A weight, latent, loss or gradient is NaN or infinite, or would be in the dtype asked for. Nothing was
    written, and no weight has moved.
    """


def and_more(names: Sequence[str]) -> str:
    """The first of the names, and how many others there are: "a", or "a and 2 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def readable(text: str, longest: int = LONGEST) -> str:
    """Text that a terminal can show, on one line."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
