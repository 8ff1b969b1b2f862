"""Choose the samples of each update, as a pure function of (seed, stream, update).

A run that resumes needs only the number of its next update.
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
"""Names the order that `shuffled` gives. It is part of a run's identity: a run that resumed with another
order would see some samples twice and others never.
"""
ROUNDS = 12


class EpochSampler:
    """Batches from `n` samples, shuffled anew in each epoch, without end.

    Sample number g of the run (g = update * batch + place in the batch) is place g % n of epoch g // n. So
    every epoch holds each sample once, and a batch may span two epochs. Each stream ("d", "g") is shuffled
    independently. Raises AptError for n or batch below 1.
    """

    def __init__(self, n: int, batch: int, seed: int, stream: str = ""):
        if n < 1 or batch < 1:
            raise AptError(f"{n} samples in batches of {batch} cannot be drawn: both must be 1 or more.")
        self.n, self.size, self.seed, self.stream = n, batch, seed, stream

    def batch(self, update: int) -> list[int]:
        """The samples of an update, as positions in 0 .. n - 1."""
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
    """Batches with one shape each. Buckets take turns in proportion to their size.

    Within a bucket, samples come in the order of an EpochSampler. buckets: positions of the samples by shape.
    Raises AptError as EpochSampler does.
    """

    def __init__(self, buckets: Mapping[tuple, Sequence[int]], batch: int, seed: int, stream: str = ""):
        self.positions = [buckets[shape] for shape in sorted(buckets)]
        self._orders = [EpochSampler(len(positions), batch, seed, stream) for positions in self.positions]
        self._turns: list[
            tuple[int, int]
        ] = []  # for each update: its bucket, and how many turns that bucket had before
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
    """The discriminator's timestep for each sample number, `[n]` in [0, 1]: `shift(U(0, 1), s)` (eq. 6).

    fixed: if given, the timestep of all samples.
    """
    t = shift(sample_uniform(numbers, seed, stream), s)
    return t if fixed is None else t.new_full(t.shape, fixed)


def split(batch: int, ranks: int, rank: int, microbatch: int | None = None) -> list[range]:
    """The places in a batch (0 .. batch - 1) that process `rank` of `ranks` takes, one range per microbatch.

    Together, the processes go through the batch from front to back. So the first samples of the batch are in
    the first microbatches, spread evenly over the processes.
    Raises AptError when the batch cannot be divided evenly.
    """
    if batch % ranks:
        raise AptError(
            f"a batch of {batch} does not divide over {ranks} processes: make it a multiple of {ranks}."
        )
    size = microbatch or batch // ranks
    if batch % (ranks * size):
        raise AptError(
            f"a batch of {batch} does not divide into microbatches of {size} on {ranks} processes: "
            f"make it a multiple of {ranks * size}."
        )
    return [range(first + rank, first + ranks * size, ranks) for first in range(0, batch, ranks * size)]


def shuffled(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of 0 .. n - 1 to these places; returns int64 of the same shape.

    keys: uint64 `[rounds]`, at least four. The whole permutation is never built, so memory does not grow with
    n. It is a Feistel network over the digits (left, right) of a x b >= n, with b = ceil(sqrt n) and the
    smallest such a; a result of n or above is permuted again until it falls below n ("cycle walking": Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002). It computes with integers only, so every
    machine gets the same order.
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
    """A 64-bit hash: the output function of SplitMix64 (Steele, Lea and Flood, 2014), applied twice."""
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
