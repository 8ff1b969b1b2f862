"""What stands beside a training (logs, pictures, a bar) and must not end it."""

import sys
from collections.abc import Callable

from apt_core.errors import readable


class Aside:
    """Calls that may fail: the first failure is said in a line and the rest is left out, while the training
    goes on.
    """

    def __init__(self, what: str) -> None:
        self.what, self.off = what, False

    def __call__(self, function: Callable, *args, **kwargs):
        """What the function returns, or None where it failed, now or before."""
        if self.off:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # a full disk, a spreadsheet that holds the file, a network that is gone, a terminal that knows no such letter, ...
            self.off = True
            reason = readable(" ".join(str(error).split()) or type(error).__name__, 200)
            warn(f"{self.what} cannot go on ({reason}): the training goes on without.")
            return None


def warn(sentence: str) -> None:
    """A line on stderr, if it takes one."""
    try:
        print(f"warning: {sentence}", file=sys.stderr)
    except (OSError, ValueError):
        pass
