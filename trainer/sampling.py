"""Which samples an update sees, as pure functions of (seed, stream, update): nothing to save but the update's number."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from apt_core.errors import AptError


class EpochSampler:
    """An endless shuffled order of `n` samples in batches.

    Sample number g of the run (update * batch + place in the batch) is place g % n of epoch g // n, so each n numbers hold every
    sample once; a batch may reach over two epochs. Streams ("d", "g") shuffle apart. Raises AptError for n or batch below 1.
    """

    def __init__(self, n: int, batch: int, seed: int, stream: str = ""):
        if n < 1 or batch < 1:
            raise AptError(f"{n} samples in batches of {batch} cannot be drawn: both must be 1 or more.")
        self.n, self.size, self.seed, self.stream = n, batch, seed, stream

    def batch(self, update: int) -> list[int]:
        """The samples of an update, as positions 0 .. n - 1."""
        places = (divmod(number, self.n) for number in range(update * self.size, (update + 1) * self.size))
        return [int(_order(self.n, self.seed, self.stream, epoch)[place]) for epoch, place in places]


class BucketSampler:
    """Batches of one shape each: buckets take turns in proportion to their sizes, and each is an endless shuffled order of its own.

    buckets: positions of the samples by shape. Raises AptError as EpochSampler does.
    """

    def __init__(self, buckets: Mapping[tuple, Sequence[int]], batch: int, seed: int, stream: str = ""):
        self.positions = [list(buckets[shape]) for shape in sorted(buckets)]
        self._orders = [EpochSampler(len(positions), batch, seed, stream) for positions in self.positions]
        self._turns: list[tuple[int, int]] = []  # bucket of each update, and how often it had been its turn before
        self._credit = [0] * len(self.positions)
        self._taken = [0] * len(self.positions)

    def batch(self, update: int) -> list[int]:
        """The samples of an update, as positions in the dataset."""
        while len(self._turns) <= update:
            self._credit = [credit + len(positions) for credit, positions in zip(self._credit, self.positions)]
            bucket = max(range(len(self._credit)), key=self._credit.__getitem__)
            self._credit[bucket] -= sum(map(len, self.positions))
            self._turns.append((bucket, self._taken[bucket]))
            self._taken[bucket] += 1
        bucket, turn = self._turns[update]
        return [self.positions[bucket][i] for i in self._orders[bucket].batch(turn)]


def split(batch: int, ranks: int, rank: int, microbatch: int | None = None) -> list[range]:
    """The places 0 .. batch - 1 of a batch that one of `ranks` processes takes, microbatch after microbatch.

    All processes together take the batch from its front to its back, so that "the first samples of the batch" come in the first
    microbatches, evenly over the processes. Raises AptError when the batch does not divide.
    """
    if batch % ranks:
        raise AptError(f"a batch of {batch} does not divide over {ranks} processes: make it a multiple of {ranks}.")
    size = microbatch or batch // ranks
    if batch % (ranks * size):
        raise AptError(
            f"a batch of {batch} does not divide into microbatches of {size} on {ranks} processes: make it a multiple of {ranks * size}."
        )
    return [range(first + rank, first + ranks * size, ranks) for first in range(0, batch, ranks * size)]


@lru_cache(maxsize=64)
def _order(n: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order/{seed}/{stream}/{epoch}".encode(), digest_size=16).digest()
    # Raw Philox words, unlike numpy's shuffles, are the same in every version of numpy.
    words = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")
