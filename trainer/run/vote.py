"""All processes of a run agree on whether one of them was told to stop."""

import time
from collections.abc import Callable

from trainer.machines.distributed import World


class Vote:
    """Tells all processes whether a flag is set in any of them. It communicates only about every `seconds`,
    because an all-reduce in every one of a thousand microbatches would slow them down.

    All processes must call this equally often, and get the same answer at the same call. How many calls pass
    between two exchanges depends on the slowest process's time per call.
    """

    def __init__(self, world: World, seconds: float = 3.0, clock: Callable[[], float] = time.monotonic):
        self.world, self.seconds, self.clock = world, seconds, clock
        self.start()

    def start(self) -> None:
        """Exchange flags at the next call, because from here on calls may take longer than before."""
        self._calls, self._every, self._asked = 0, 0, None

    def __call__(self, flag: bool) -> bool:
        """Whether the flag is set in any process; False if it is not time to exchange flags."""
        if self.world.size == 1:
            return flag
        self._calls += 1
        if self._calls < self._every:
            return False
        now = self.clock()
        pace = 0.0 if self._asked is None else (now - self._asked) / self._calls
        found, slowest = self.world.largest(flag, pace)
        # At most doubled: the first calls may have been shorter than the next ones.
        self._every = max(1, min(2 * self._every, int(self.seconds / slowest) if slowest else 1))
        self._calls, self._asked = 0, self.clock()
        return bool(found)
