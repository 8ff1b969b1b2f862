"""Which samples an update sees: each once an epoch, whatever the processes, the microbatches and the
interruptions.
"""

import math
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from apt_core.errors import AptError
from trainer.data.sampling import BucketSampler, EpochSampler, _keys, shuffled, split


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 7), (5, 12), (64, 16)])
def test_every_sample_once_per_epoch(n, batch):
    sampler, drawn, updates = EpochSampler(n, batch, seed=3), [], 3 * n
    for update in range(updates):
        drawn += sampler.batch(update)
    epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
    assert len(epochs) == updates * batch // n
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("n", [*range(1, 40), 1000, 65536, 65537])
def test_a_keyed_order_holds_each_place_once_and_every_piece_of_it_is_the_same(n):
    orders = [shuffled(np.arange(n), n, _keys(0, "d", epoch)) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in orders)
    some = np.array([n // 3, 0, n - 1])
    assert [shuffled(some, n, _keys(0, "d", epoch)).tolist() for epoch in range(3)] == [
        order[some].tolist() for order in orders
    ]


def test_a_keyed_order_is_as_random_as_a_shuffle():
    """Chi-squared over many epochs: every order of four samples, every place of each of 30, and what follows
    what.
    """
    epochs = 6000
    found = Counter(
        tuple(shuffled(np.arange(4), 4, _keys(1, "d", epoch)).tolist()) for epoch in range(epochs)
    )
    seen, after = np.zeros((30, 30)), np.zeros(30)
    for epoch in range(epochs):
        order = shuffled(np.arange(30), 30, _keys(2, "d", epoch))
        seen[np.arange(30), order] += 1
        after[(order[1] - order[0]) % 30] += 1
    four = np.array([found[order] for order in permutations(range(4))])
    for counts, free in ((four, 23), (seen, 29 * 29), (after[1:], 28)):
        expected = counts.sum() / counts.size
        assert abs((np.square(counts - expected) / expected).sum() - free) < 4 * math.sqrt(2 * free)


def test_ten_million_samples_cost_no_more_than_their_batch():
    """A table of the epoch's order would be 80 MB."""
    tracemalloc.start()
    try:
        batch = EpochSampler(10_000_000, 9064, 0, "d").batch(5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(batch)) == 9064 and 0 <= min(batch) < 10_000 and 9_990_000 < max(batch) < 10_000_000
    assert peak < 2 * 2**20


def test_buckets_take_turns_in_proportion_and_hold_each_sample_once():
    buckets = {(4, 1): range(0, 3), (4, 2): range(3, 9), (4, 3): range(9, 10)}  # 3, 6 and 1 of 10 samples
    sampler = BucketSampler(buckets, 2, seed=0)
    batches = [sampler.batch(update) for update in range(30)]
    kinds = [
        next(shape for shape, positions in buckets.items() if batch[0] in positions) for batch in batches
    ]
    assert all(set(batch) <= set(buckets[kind]) for batch, kind in zip(batches, kinds))
    assert Counter(kinds[:10]) == Counter(kinds[10:20]) == {(4, 1): 3, (4, 2): 6, (4, 3): 1}
    assert Counter(i for batch in batches[:10] for i in batch) == dict.fromkeys(range(10), 2)
    for shape, positions in buckets.items():  # within a bucket, each sample once before any is seen again
        drawn = [i for batch, kind in zip(batches, kinds) if kind == shape for i in batch]
        assert all(
            sorted(drawn[i : i + len(positions)]) == list(positions)
            for i in range(0, len(drawn) - len(positions) + 1, len(positions))
        )


def test_a_resumed_sampler_goes_on_where_the_other_stopped():
    buckets = {(1,): range(5), (2,): range(5, 12)}
    whole = [BucketSampler(buckets, 4, seed=1).batch(update) for update in range(20)]
    running = BucketSampler(buckets, 4, seed=1)
    assert [running.batch(update) for update in range(20)] == whole


def test_any_number_of_processes_and_microbatches_takes_each_place_once_and_the_first_first():
    for ranks, micro in ((1, None), (1, 3), (2, None), (2, 3), (4, 1), (3, 2)):
        parts = [split(12, ranks, rank, micro) for rank in range(ranks)]
        assert sorted(place for part in parts for places in part for place in places) == list(range(12))
        steps = [sorted(place for part in parts for place in part[step]) for step in range(len(parts[0]))]
        assert [place for step in steps for place in step] == list(range(12))
    with pytest.raises(
        AptError, match="batch of 12 does not divide over 5 processes: make it a multiple of 5"
    ):
        split(12, 5, 0)
    with pytest.raises(
        AptError,
        match="batch of 12 does not divide into microbatches of 4 on 2 processes: make it a multiple of 8",
    ):
        split(12, 2, 0, 4)


def test_streams_and_seeds_shuffle_apart_and_stay_as_they_are():
    orders = {
        (seed, stream): tuple(EpochSampler(100, 100, seed, stream).batch(0))
        for seed in (0, 1)
        for stream in ("", "d", "g")
    }
    assert len(set(orders.values())) == 6
    # Pinned: the order belongs to a run, over every version of this program and of numpy.
    assert EpochSampler(10, 10, 0, "d").batch(0) == [0, 3, 6, 8, 1, 5, 4, 7, 2, 9]
    assert EpochSampler(10_000_000, 4, 0, "d").batch(5) == [7192787, 1738991, 2428033, 591312]


def test_impossible_draws():
    for n, batch in ((0, 4), (4, 0)):
        with pytest.raises(AptError, match="must be 1 or more"):
            EpochSampler(n, batch, 0)
