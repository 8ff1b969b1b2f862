"""What is read and drawn for an update: ahead of time, by no second team of torch's threads, and no more than
the objective uses.
"""

import os
import subprocess
import sys
from dataclasses import replace

import layouts
import pytest
import torch
from layouts import SHAPE, TEXT_DIM

from apt_core.method.flow import sample_noise
from apt_core.method.objectives import Objective
from trainer.data.batches import Batches, Micro
from trainer.machines.distributed import World
from trainer.stages.adversarial import draw_noises, share_of_penalties

THREADS = """
import os, sys, torch
from concurrent.futures import ThreadPoolExecutor
from trainer.data.shards import ShardDataset
torch.set_num_threads(2)
torch.rand(400, 400) @ torch.rand(400, 400)  # the training's own team
data, count = ShardDataset(sys.argv[1], "video"), lambda: len(os.listdir("/proc/self/task"))
before = count()
with ThreadPoolExecutor(1) as reader:
    x = reader.submit(data.batch, list(range(11)) * 400).result()[0]
    print(x.numel(), count() - before)
"""


@pytest.fixture
def watched(files):
    """Batches, and the samples that were read from them so far."""
    batches, read = Batches(files.shards, layouts.Text(), seed=0), []
    for data in batches.datasets.values():

        def batch(indices, data=data, original=data.batch):
            read.extend(data.samples[i].id for i in indices)
            return original(indices)

        data.batch = batch
    return batches, read


def settle(batches):
    batches._reader.submit(lambda: None).result()


@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_next_updates_first_microbatch_is_read_while_the_last_one_is_trained_on(
    microbatch, watched, files
):
    batches, read = watched
    plain = Batches(files.shards, layouts.Text(), seed=0)
    expected = [
        [micro.names for micro in plain.take("video", "video/d", update, 4, World(), microbatch)]
        for update in range(3)
    ]
    for update in range(3):
        for number, micro in enumerate(batches.take("video", "video/d", update, 4, World(), microbatch)):
            assert micro.names == expected[update][number] and micro.numbers[0] == 4 * update + 2 * number
            if number == len(expected[update]) - 1 and update < 2:
                settle(batches)
                assert (
                    read
                    == sum((sum(names, []) for names in expected[: update + 1]), []) + expected[update + 1][0]
                )
    settle(batches)
    assert read[:12] == sum((sum(names, []) for names in expected), []) and len(read) == 12 + (
        microbatch or 4
    )


def test_the_next_update_may_be_of_another_kind_and_size(watched):
    batches, read = watched
    [first] = batches.take("image", "distill", 0, 2, World(), following=("video", 4))
    settle(batches)
    ahead = read[2:]
    [second] = batches.take("video", "distill", 1, 4, World(), following=("video", 4))
    assert (
        len(ahead) == 4
        and second.names == ahead
        and second.numbers == [4, 5, 6, 7]
        and first.names == read[:2]
    )
    [other] = batches.take("image", "distill", 2, 2, World())  # not what was foretold
    settle(batches)
    assert all(name.startswith("image-") for name in other.names) and other.numbers == [4, 5]


def test_a_reader_starts_no_threads_of_torch(files):
    """They would take half of a CPU's cores from the training."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", THREADS, str(files.shards)],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    ).stdout
    assert out.split() == [str(4400 * torch.Size(SHAPE).numel()), "1"]


def micro(places: list[int]) -> Micro:
    return Micro(
        [100 + place for place in places],
        places,
        torch.zeros(len(places), *SHAPE),
        torch.zeros(len(places), 5, TEXT_DIM),
        [],
        0.5,
    )


@pytest.mark.parametrize(
    "objective, places, rows",
    [
        (Objective.paper("video"), [0, 1, 2, 3], (4, None)),
        (Objective.stable("video"), [0, 1, 2, 3], (2, 2)),  # a quarter of eight
        (Objective.stable("video"), [4, 5, 6, 7], (None, None)),
        (replace(Objective.paper("video"), r1_weight=0.0), [0, 1, 2, 3], (None, None)),
    ],
)
def test_noise_is_drawn_for_the_penalties_in_use_and_is_what_it_was(objective, places, rows):
    part, _ = share_of_penalties(objective, micro(places), 8, World())
    noises = draw_noises(part, micro(places), 0, "video")
    assert tuple(noise if noise is None else len(noise) for noise in noises) == rows
    for name, noise in zip(("r1", "r2"), noises):
        if noise is not None:
            assert torch.equal(
                noise,
                sample_noise([100 + place for place in places], SHAPE, 0, f"video/d/{name}")[: len(noise)],
            )
