"""The number that says which states to keep: known values, the right order, the same for any number of
processes.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apt_core.models.vae import encode, load_vae
from trainer.machines.distributed import World
from trainer.mini import ASSETS
from trainer.mini.clips import render, scene
from trainer.mini.judge import travel
from trainer.run.judge import LatentJudge, distance, guarded, motion, statistics

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


class Images(Data):
    """One frame of each."""

    def get(self, i):
        x, *rest = super().get(i)
        return x[:, :1], *rest


def judge_of(batches):
    return LatentJudge(batches, "image", 40, 0, World())


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
        judge()(Velocity(*how))["judged"] for how in ((1.0,), (0.7,), (1.0, 0.3), (0.0, 0.1))
    )
    # 0.08 is what 40 samples differ by chance
    assert perfect < 0.2 < dull < still and perfect < 0.2 < shifted
    assert judge()(Velocity(1.0))["judged"] == perfect


def test_motion_by_hand():
    still = torch.arange(12.0).reshape(1, 1, 1, 3, 4).expand(2, 2, 4, 3, 4)
    assert torch.equal(motion(still), torch.zeros(2))
    assert torch.equal(motion(torch.randn(2, 3, 1, 4, 4)), torch.zeros(2))  # images
    # flat frames, that go from a to b: all spread is in time
    flat = torch.tensor([1.0, 5.0]).reshape(1, 1, 2, 1, 1).expand(1, 1, 2, 3, 4)
    assert motion(flat).tolist() == [pytest.approx(1.0)]
    # over time 2 and -2 around what has variance 12 in space: 4 of 16
    x = torch.tensor([-1.0, 1.0]).mul(12**0.5).reshape(1, 1, 1, 1, 2) + torch.tensor([2.0, -2.0]).reshape(
        1, 1, 2, 1, 1
    )
    assert motion(x).tolist() == [pytest.approx(0.5)] and motion(7 * x - 3).tolist() == [pytest.approx(0.5)]
    first = torch.full((1, 1, 1, 1, 2), 100.0)  # one frame, where the others are four
    assert motion(torch.cat([first, x], dim=2)).tolist() == [pytest.approx(0.5)]


def test_motion_orders_still_slow_and_real_clips():
    """Latents of drawn clips at the share of their speed: each clip by itself, and clearly in the mean."""
    torch.set_num_threads(1)
    vae, scenes = (
        load_vae(ASSETS / "vae" / "apt_mini_vae.safetensors"),
        [scene(5, i, True) for i in range(12)],
    )
    moved, found = [], []
    for share in (0.0, 0.5, 1.0):
        pixels = np.stack([render(replace(item, travel=share * item.travel), 9) for item in scenes])
        x = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.no_grad():
            found.append(motion(encode(vae, x)))
        moved.append(travel(pixels))
    still, slow, real = found
    assert (still < slow).all() and (slow < real).all()
    assert still.mean() < 0.4 * real.mean() and 0.65 * real.mean() < slow.mean() < 0.85 * real.mean()
    still, slow, real = moved
    assert still.max() == 0 and slow.sub(real / 2).abs().max() < 0.7


def test_states_that_lost_their_motion_are_judged_worse(monkeypatch):
    """A distance times as much larger as the share of motion is smaller: the same statistics lose by it."""
    assert [guarded(2.0, share) for share in (2.0, 1.0, 0.5, 0.0)] == [2.0, 2.0, 4.0, 200.0]
    found = judge()(Velocity(1.0))
    assert found["judged_motion"] == pytest.approx(1.0, abs=0.02) and found["judged"] < 0.2

    class Slow(Velocity):
        """White noise of which each frame is half the first one's."""

        def forward(self, hidden_states, **_):
            return (hidden_states - (hidden_states + hidden_states[:, :, :1]) / 2**0.5,)

    slow = judge()(Slow(1.0))
    monkeypatch.setattr("trainer.run.judge.guarded", lambda distance, share: distance)
    plain = judge()(Slow(1.0))
    assert slow["judged_motion"] == plain["judged_motion"] < 0.85
    assert slow["judged"] == pytest.approx(plain["judged"] / plain["judged_motion"])
    images = SimpleNamespace(datasets={"image": Images()})
    assert judge_of(images)(Velocity(0.9)).keys() == {"judged"}


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
