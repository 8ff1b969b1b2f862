"""Noise by either rule, by value: the streams of `sample_noise`, and torch's generator as ComfyUI uses it."""

import math

import pytest
import torch

from apt_core.errors import AptError
from apt_core.method.flow import sample_noise
from apt_core.method.noise import NOISES, draw, slerp, walk

SHAPE = (16, 3, 4, 6)


def test_apt_noise_is_a_stream_for_each_number_and_step():
    for step, stream in enumerate(("generate/z", "generate/step1", "generate/step2")):
        whole = sample_noise(range(4), SHAPE, 7, stream)
        assert all(torch.equal(draw("apt", 7, number, SHAPE, step), whole[number]) for number in range(4))


def test_comfyui_noise_is_that_of_prepare_noise_and_goes_on_from_there():
    # comfy/sample.py: torch.manual_seed(seed), randn of the latent's whole shape, fp32, on the CPU.
    torch.manual_seed(9 + 2)
    expected = [torch.randn(1, *SHAPE, dtype=torch.float32, device="cpu")[0] for _ in range(3)]
    assert all(torch.equal(draw("comfyui", 9, 2, SHAPE, step), expected[step]) for step in range(3))
    # Seeds go up to 2^64 - 1; the next item starts over.
    assert torch.equal(draw("comfyui", 2**64 - 1, 1, SHAPE), draw("comfyui", 0, 0, SHAPE))


def test_what_tells_the_rules_apart():
    assert torch.equal(draw("comfyui", 0, 1, SHAPE), draw("comfyui", 1, 0, SHAPE))
    assert not torch.isclose(draw("apt", 0, 1, SHAPE), draw("apt", 1, 0, SHAPE)).any()
    for rule in NOISES:
        assert draw(rule, 0, 0, SHAPE).shape == SHAPE and draw(rule, 0, 0, SHAPE).dtype == torch.float32
    with pytest.raises(AptError, match=r"^noise 'gpu' is not known: use apt or comfyui\.$"):
        draw("gpu", 0, 0, SHAPE)


def test_a_walk_keeps_the_norm_and_turns_in_equal_angles():
    a, b = draw("apt", 0, 0, SHAPE), 1.2 * draw("apt", 1, 0, SHAPE)
    way = [walk([a, b], item, 9) for item in range(9)]
    assert way[0] is a and way[8] is b
    flat = torch.stack(way).flatten(1).double()
    norms = flat.norm(dim=1)
    torch.testing.assert_close(
        norms, torch.linspace(norms[0], norms[8], 9, dtype=torch.float64), rtol=1e-6, atol=0
    )
    cosines = torch.nn.functional.cosine_similarity(flat[1:], flat[:-1])
    whole = math.acos(torch.nn.functional.cosine_similarity(flat[:1], flat[8:]).item())
    torch.testing.assert_close(
        cosines, torch.full((8,), math.cos(whole / 8), dtype=torch.float64), rtol=1e-6, atol=0
    )
    # In a plane: each place is a mix of the two ends.
    rest = flat - flat @ torch.linalg.pinv(flat[[0, 8]]) @ flat[[0, 8]]
    assert rest.norm() < 1e-5 * norms[0]


def test_where_there_is_no_arc_the_way_is_straight():
    a = draw("apt", 0, 0, SHAPE)
    assert torch.equal(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)
