"""Which samples an update sees, as pure functions of (seed, stream, update): nothing to save but the update's
number.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from apt_core.errors import AptError
from apt_core.method.flow import sample_uniform, shift

ORDER = "feistel-1"
"""Names the order that `shuffled` gives. Part of a run's identity: a state of another order would see samples
twice, and others never.
"""
ROUNDS = 12


class EpochSampler:
    """An endless shuffled order of `n` samples in batches.

    Sample number g of the run (update * batch + place in the batch) is place g % n of epoch g // n, so each n
    numbers hold every sample once; a batch may reach over two epochs. Streams ("d", "g") shuffle apart.
    Raises AptError for n or batch below 1.
    """

    def __init__(self, n: int, batch: int, seed: int, stream: str = ""):
        if n < 1 or batch < 1:
            raise AptError(f"{n} samples in batches of {batch} cannot be drawn: both must be 1 or more.")
        self.n, self.size, self.seed, self.stream = n, batch, seed, stream

    def batch(self, update: int) -> list[int]:
        """The samples of an update, as positions 0 .. n - 1."""
        number, end, out = update * self.size, (update + 1) * self.size, []
        while number < end:
            epoch, place = divmod(number, self.n)
            count = min(self.n - place, end - number)
            out += shuffled(
                np.arange(place, place + count), self.n, _keys(self.seed, self.stream, epoch)
            ).tolist()
            number += count
        return out


class BucketSampler:
    """Batches of one shape each: buckets take turns in proportion to their sizes, and each is an endless
    shuffled order of its own.

    buckets: positions of the samples by shape. Raises AptError as EpochSampler does.
    """

    def __init__(self, buckets: Mapping[tuple, Sequence[int]], batch: int, seed: int, stream: str = ""):
        self.positions = [buckets[shape] for shape in sorted(buckets)]
        self._orders = [EpochSampler(len(positions), batch, seed, stream) for positions in self.positions]
        self._turns: list[
            tuple[int, int]
        ] = []  # bucket of each update, and how often it had been its turn before
        self._credit = [0] * len(self.positions)
        self._taken = [0] * len(self.positions)

    def batch(self, update: int) -> list[int]:
        """The samples of an update, as positions in the dataset."""
        while len(self._turns) <= update:
            self._credit = [
                credit + len(positions) for credit, positions in zip(self._credit, self.positions)
            ]
            bucket = max(range(len(self._credit)), key=self._credit.__getitem__)
            self._credit[bucket] -= sum(map(len, self.positions))
            self._turns.append((bucket, self._taken[bucket]))
            self._taken[bucket] += 1
        bucket, turn = self._turns[update]
        return [self.positions[bucket][i] for i in self._orders[bucket].batch(turn)]


def discriminator_times(
    numbers: Sequence[int], seed: int, stream: str, s: float, fixed: float | None = None
) -> Tensor:
    """The discriminator's timestep for each sample number, [n] in [0, 1]: `shift(U(0, 1), s)` of eq. 6, or
    the fixed one.
    """
    t = shift(sample_uniform(numbers, seed, stream), s)
    return t if fixed is None else t.new_full(t.shape, fixed)


def split(batch: int, ranks: int, rank: int, microbatch: int | None = None) -> list[range]:
    """The places 0 .. batch - 1 of a batch that one of `ranks` processes takes, microbatch after microbatch.

    All processes together take the batch from its front to its back, so that "the first samples of the batch"
    come in the first microbatches, evenly over the processes. Raises AptError when the batch does not divide.
    """
    if batch % ranks:
        raise AptError(
            f"a batch of {batch} does not divide over {ranks} processes: make it a multiple of {ranks}."
        )
    size = microbatch or batch // ranks
    if batch % (ranks * size):
        raise AptError(
            f"a batch of {batch} does not divide into microbatches of {size} on {ranks} processes: make it a multiple of {ranks * size}."
        )
    return [range(first + rank, first + ranks * size, ranks) for first in range(0, batch, ranks * size)]


def shuffled(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0 .. n - 1 sends these places, int64 of their shape; nothing of n's size
    is made.

    keys: uint64 [rounds], at least four. A Feistel network over digits (left, right) of the smallest a x b >=
    n with b = ceil(sqrt n); whoever lands at n or above walks on (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002). Integers alone, the same everywhere.
    """
    b = math.isqrt(n - 1) + 1
    a = -(-n // b)
    out = np.array(places, np.uint64)
    walking = np.arange(out.size)
    while walking.size:
        left, right = np.divmod(out.flat[walking], np.uint64(b))
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _mixed(left, key) % np.uint64(b)) % np.uint64(b)
            else:
                left = (left + _mixed(right, key) % np.uint64(a)) % np.uint64(a)
        out.flat[walking] = left * np.uint64(b) + right
        walking = walking[out.flat[walking] >= n]
    return out.astype(np.int64)


def _mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of 64 bits: the output function of SplitMix64 (Steele, Lea and Flood, 2014), twice."""
    x = x + key
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


@lru_cache(maxsize=64)
def _keys(seed: int, stream: str, epoch: int) -> np.ndarray:
    digests = (
        hashlib.blake2b(f"{ORDER}/{seed}/{stream}/{epoch}/{half}".encode(), digest_size=4 * ROUNDS).digest()
        for half in (0, 1)
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
