"""Which samples an update sees: each once an epoch, whatever the processes, the microbatches and the interruptions."""

from collections import Counter

import pytest

from apt_core.errors import AptError
from trainer.sampling import BucketSampler, EpochSampler, split


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 7), (5, 12), (64, 16)])
def test_every_sample_once_per_epoch(n, batch):
    sampler, drawn, updates = EpochSampler(n, batch, seed=3), [], 3 * n
    for update in range(updates):
        drawn += sampler.batch(update)
    epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
    assert len(epochs) == updates * batch // n
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_buckets_take_turns_in_proportion_and_hold_each_sample_once():
    buckets = {(4, 1): range(0, 3), (4, 2): range(3, 9), (4, 3): range(9, 10)}  # 3, 6 and 1 of 10 samples
    sampler = BucketSampler(buckets, 2, seed=0)
    batches = [sampler.batch(update) for update in range(30)]
    kinds = [next(shape for shape, positions in buckets.items() if batch[0] in positions) for batch in batches]
    assert all(set(batch) <= set(buckets[kind]) for batch, kind in zip(batches, kinds))
    assert Counter(kinds[:10]) == Counter(kinds[10:20]) == {(4, 1): 3, (4, 2): 6, (4, 3): 1}
    assert Counter(i for batch in batches[:10] for i in batch) == dict.fromkeys(range(10), 2)
    for shape, positions in buckets.items():  # within a bucket, each sample once before any is seen again
        drawn = [i for batch, kind in zip(batches, kinds) if kind == shape for i in batch]
        assert all(sorted(drawn[i : i + len(positions)]) == list(positions) for i in range(0, len(drawn) - len(positions) + 1, len(positions)))


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
    with pytest.raises(AptError, match="batch of 12 does not divide over 5 processes: make it a multiple of 5"):
        split(12, 5, 0)
    with pytest.raises(AptError, match="batch of 12 does not divide into microbatches of 4 on 2 processes: make it a multiple of 8"):
        split(12, 2, 0, 4)


def test_streams_and_seeds_shuffle_apart_and_stay_as_they_are():
    orders = {(seed, stream): tuple(EpochSampler(100, 100, seed, stream).batch(0)) for seed in (0, 1) for stream in ("", "d", "g")}
    assert len(set(orders.values())) == 6
    # Pinned: the order belongs to a run, over every version of this program and of numpy.
    assert EpochSampler(10, 10, 0, "d").batch(0) == [8, 0, 4, 6, 9, 5, 1, 3, 7, 2]


def test_impossible_draws():
    for n, batch in ((0, 4), (4, 0)):
        with pytest.raises(AptError, match="must be 1 or more"):
            EpochSampler(n, batch, 0)
