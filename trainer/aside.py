"""Keep a training alive when something beside it (logs, pictures, a progress bar) fails."""

import sys
from collections.abc import Callable

from apt_core.errors import readable


class Aside:
    """Calls functions that may fail. The first failure prints one line, and later calls are skipped."""

    def __init__(self, what: str) -> None:
        self.what, self.off = what, False

    def __call__(self, function: Callable, *args, **kwargs):
        """Return what the function returns, or None if this call or an earlier one failed."""
        if self.off:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # a full disk, a file open elsewhere, a lost network, ...
            self.off = True
            reason = readable(" ".join(str(error).split()) or type(error).__name__, 200)
            warn(f"{self.what} cannot go on ({reason}): the training goes on without.")
            return None


def warn(sentence: str) -> None:
    """Print a line on stderr, if stderr accepts it."""
    try:
        print(f"warning: {sentence}", file=sys.stderr)
    except (OSError, ValueError):
        pass
