"""Noise by either rule, by value: the streams of `sample_noise`, and torch's generator as ComfyUI uses it."""

import pytest
import torch

from apt_core.errors import AptError
from apt_core.flow import sample_noise
from apt_core.noise import NOISES, draw

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
