"""The number that says which states to keep: known values, the right order, the same for any number of
processes.
"""

from types import SimpleNamespace

import pytest
import torch

from trainer.machines.distributed import World
from trainer.run.judge import LatentJudge, distance, statistics

SHAPES = [(3, 2, 8, 6), (3, 3, 4, 8)]


class Velocity(torch.nn.Module):
    """A generator whose one step gives `scale z + offset`."""

    def __init__(self, scale, offset=0.0):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True, taps=None):
        return ((1 - self.scale) * hidden_states - self.offset,)


class Data:
    """Latents of white noise, of two shapes."""

    def __len__(self):
        return 40

    def get(self, i):
        return (
            torch.randn(SHAPES[i % 2], generator=torch.Generator().manual_seed(i)),
            torch.ones(2, 5),
            "a caption",
        )

    def batch(self, indices):
        return (
            torch.stack([self.get(i)[0] for i in indices]),
            torch.ones(len(indices), 2, 5),
            ["a caption"] * len(indices),
        )


def one_of(dp, dp_rank, cp, gather) -> World:
    """A World that believes to be one process of several, and gathers as it is told."""
    return type("One", (World,), {"dp": dp, "dp_rank": dp_rank, "cp": cp, "gather": staticmethod(gather)})()


def judge(count=40, world=None):
    return LatentJudge(SimpleNamespace(datasets={"video": Data()}), "video", count, 0, world or World())


def test_statistics_by_hand():
    # [1, 2, 2, 3]: 1 to the right, 3 down, 10 a frame
    ramp = torch.stack([torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 10])[None]
    mean, std, space, motion = statistics(ramp)
    assert mean == 7.5 and std == pytest.approx(float(ramp.std()))
    assert space == pytest.approx(10**0.5) and motion == 10
    assert (
        statistics(torch.randn(4, 1, 3, 3)).shape == (16,)
        and not statistics(torch.randn(4, 1, 3, 3))[12:].any()
    )


def test_distance_by_hand():
    real = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 9.0]])  # spreads 2 and 4
    assert distance(real.flip(0), real) == 0
    # one unit in one of two features
    assert distance(real + torch.tensor([2.0, 0.0]), real) == pytest.approx(0.5)
    assert distance(real.mean(0).expand(3, 2), real) == pytest.approx(1.0)  # all alike: no spread in either


def test_better_generators_are_judged_better():
    perfect, dull, shifted, still = (
        judge()(Velocity(*how)) for how in ((1.0,), (0.7,), (1.0, 0.3), (0.0, 0.1))
    )
    # 0.08 is what 40 samples differ by chance
    assert perfect < 0.2 < dull < still and perfect < 0.2 < shifted
    assert judge()(Velocity(1.0)) == perfect


def test_processes_share_the_samples_and_agree():
    """Five samples on two rows of two context-parallel processes: the third round has only one of its own."""
    alone, gathered = judge(5)(Velocity(0.9)), {}
    parts = [[], []]
    for rank in (0, 1):

        def gather(value, rank=rank):
            parts[rank].append(value)
            return [value, value]

        judge(5, one_of(2, rank, 1, gather))(Velocity(0.9))
    for rank in (0, 1):
        rounds = iter(zip(*parts))
        world = one_of(2, rank, 2, lambda value: [part for part in next(rounds) for _ in range(2)])
        gathered[rank] = judge(5, world)(Velocity(0.9))
    assert {part.shape[0] for part in (*parts[0], *parts[1])} == {3}
    assert gathered == {0: alone, 1: alone}
