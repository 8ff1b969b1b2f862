"""The decoder's Triton kernels against torch: on a GPU, or on a CPU in Triton's interpreter
(TRITON_INTERPRET=1).
"""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip(
    "triton", reason="Triton is not installed: the decoder then uses torch, which test_decoder.py tests"
)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from apt_core.engine import kernels
from apt_core.engine.decoder_layers import Stream, Whole, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("channels", [3, 16, 96])
@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("norm", [True, False])
def test_extend(channels, t, norm):
    x, gamma, before = draw(t + 1, 3, 7, channels)[1:], draw(channels), draw(2, 3, 7, channels)
    new = F.silu(rms_norm(x, gamma, torch.empty_like(x))) if norm else x
    expected = torch.cat([before, new])
    remembered = before.clone()
    torch.testing.assert_close(
        kernels.extend(x, gamma if norm else None, remembered, memory=2, keep=True),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(remembered, expected[-2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        kernels.extend(x, gamma if norm else None, before, memory=2, keep=False),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )
    expected[:2] = 0
    torch.testing.assert_close(
        kernels.extend(x, gamma if norm else None, None, memory=2, keep=True), expected, rtol=1e-5, atol=1e-6
    )
    out = torch.empty_like(x)
    assert kernels.extend(x, gamma if norm else None, None, memory=0, keep=False, out=out) is out
    torch.testing.assert_close(out, new, rtol=1e-5, atol=1e-6)


def test_a_band_of_rows_and_zeros():
    whole, gamma, before = draw(2, 6, 5, 8), draw(8), draw(2, 2, 5, 8)
    whole[1, 3] = 0
    found = kernels.extend(whole[:, 2:4], gamma, before, memory=2, keep=True)
    expected = F.silu(rms_norm(whole[:, 2:4], gamma, torch.empty(2, 2, 5, 8, device=DEVICE)))
    torch.testing.assert_close(found[2:], expected, rtol=1e-5, atol=1e-6)
    assert (found[3, 1] == 0).all()


def test_bf16_is_rounded_once():
    x, gamma = draw(2, 3, 4, 96, dtype=torch.bfloat16), draw(96, dtype=torch.bfloat16)
    wide = F.normalize(x.float(), dim=-1) * gamma.float()
    found = kernels.extend(x, gamma, None, memory=0, keep=False)
    one_step = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts off where the GPU rounds
    torch.testing.assert_close(found.float(), F.silu(wide), rtol=one_step, atol=1e-6)


class Layer:
    index = 0


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3), (1, 4)])
def test_streams_with_and_without_kernels_agree(counts):
    plain, fused = Stream(Whole()), Stream(Whole(), kernels=kernels)
    gamma = draw(8)
    for i, t in enumerate(counts):
        x = draw(t + i, 3, 4, 8)[i:]
        plain.last = fused.last = i == len(counts) - 1
        torch.testing.assert_close(
            fused.extend(Layer, x, gamma), plain.extend(Layer, x, gamma), rtol=1e-5, atol=1e-6
        )
        for key, frames in plain.memory.items():
            torch.testing.assert_close(fused.memory[key], frames, rtol=1e-5, atol=1e-6)
