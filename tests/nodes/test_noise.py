"""Noise with a seed for each item, and walks through it. Plain torch: no ComfyUI needed."""

import math
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from apt_core.method.noise import draw

ROOT = Path(__file__).parents[2]
SHAPE = (16, 3, 4, 4)


@pytest.fixture(scope="module")
def noise():
    """nodes/noise.py in a package, as ComfyUI has it."""
    spec = spec_from_file_location("apt_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["apt_pack"] = module_from_spec(spec)
    yield import_module("apt_pack.nodes.noise")
    for name in [name for name in sys.modules if name.partition(".")[0] == "apt_pack"]:
        del sys.modules[name]


def batch(items: int, **more) -> dict:
    return {"samples": torch.zeros(items, *SHAPE), **more}


def stock(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(1, *SHAPE)[0]


def test_an_item_is_what_stock_nodes_make_of_its_seed(noise):
    made = noise.SeedNoise(5).generate_noise(batch(3))
    assert all(torch.equal(item, stock(5 + i)) for i, item in enumerate(made))
    assert torch.equal(
        noise.SeedNoise(5).generate_noise(batch(2, batch_index=[7, 1])), torch.stack([stock(12), stock(6)])
    )
    # Seeds go up to 2^64 - 1; the next item starts over.
    assert torch.equal(
        noise.SeedNoise(2**64 - 1).generate_noise(batch(2)), torch.stack([stock(2**64 - 1), stock(0)])
    )


def test_further_steps_go_on_from_there(noise):
    torch.manual_seed(9)
    expected = [torch.randn(SHAPE) for _ in range(3)]
    assert all(
        torch.equal(noise.SeedNoise(9).generate_noise(batch(1), step)[0], expected[step]) for step in range(3)
    )


def test_apt_noise_is_the_pipelines_for_the_same_seed(noise):
    for step in range(3):
        made = noise.SeedNoise(5, "apt").generate_noise(batch(3), step)
        assert all(torch.equal(item, draw("apt", 5, i, SHAPE, step)) for i, item in enumerate(made))
    cut = noise.SeedNoise(5, "apt").generate_noise(batch(2, batch_index=[7, 1]))
    assert torch.equal(cut, torch.stack([draw("apt", 5, 7, SHAPE), draw("apt", 5, 1, SHAPE)]))


def test_an_open_walk_ends_at_its_last_seed(noise):
    walk = noise.WalkNoise([4, 9, 2], closed=False).generate_noise(batch(7))
    for item, seed in ((0, 4), (3, 9), (6, 2)):
        assert torch.equal(walk[item], stock(seed))
    assert torch.equal(noise.WalkNoise([4, 9], closed=False).generate_noise(batch(1))[0], stock(4))


def test_a_closed_walk_comes_back_to_its_first_seed(noise):
    walk = noise.WalkNoise([4, 9, 2], closed=True).generate_noise(batch(9))
    for item, seed in ((0, 4), (3, 9), (6, 2)):
        assert torch.equal(walk[item], stock(seed))
    # The step over the seam is as long as any other of its leg.
    steps = (walk - walk.roll(1, 0)).flatten(1).norm(dim=1)
    assert steps[0] == pytest.approx(steps[7].item(), rel=0.05) and steps[0] == pytest.approx(
        steps[8].item(), rel=0.05
    )


def test_in_between_the_noise_is_still_normal_and_the_steps_equal(noise):
    big = {"samples": torch.zeros(6, 16, 4, 32, 32)}
    walk = noise.WalkNoise([1, 2], closed=False).generate_noise(big)
    flat = walk.flatten(1)
    # 65,536 numbers: the standard error of their variance is 0.0055, of their mean 0.004.
    torch.testing.assert_close(flat.var(1), torch.ones(6), rtol=0, atol=0.025)
    torch.testing.assert_close(flat.mean(1), torch.zeros(6), rtol=0, atol=0.02)
    torch.testing.assert_close(flat.pow(4).mean(1), torch.full((6,), 3.0), rtol=0, atol=0.2)
    # Neighbours on a quarter circle in 5 steps are 18 degrees apart.
    neighbours = torch.nn.functional.cosine_similarity(flat[1:], flat[:-1])
    torch.testing.assert_close(neighbours, torch.full((5,), math.cos(math.pi / 10)), rtol=0, atol=0.01)
