"""Triton kernels of the VAE's decoder, imported only on CUDA. decoder_layers has the same in torch."""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] - only torch for CUDA brings it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

POSITIONS_TIMES_CHANNELS = 8192
"""How many numbers one program works on at a time."""


@triton.jit
def _extend(
    x,
    gamma,
    before,
    out,
    t,
    positions,
    x_frame,
    before_frame,
    out_frame,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMORY: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
):
    # From 2 GiB of numbers on, a frame's offset does not fit in 32 bits.
    x_frame, before_frame, out_frame = x_frame.to(tl.int64), before_frame.to(tl.int64), out_frame.to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)
    inside = (position[:, None] < positions) & (channel[None, :] < C)
    place = position[:, None] * C + channel[None, :]
    weight = tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32) if NORM else 0.0
    # The same program reads a position's remembered values and later overwrites them: the order is safe.
    for i in tl.static_range(MEMORY):
        old = (
            tl.load(before + i * before_frame + place, mask=inside, other=0.0)
            if HAS_BEFORE
            else tl.zeros((BLOCK, BLOCK_C), out.dtype.element_ty)
        )
        tl.store(out + i * out_frame + place, old, mask=inside)
        if KEEP:
            # When a call has fewer new frames than are remembered, the younger old frames stay.
            if i >= t:
                tl.store(before + (i - t) * before_frame + place, old, mask=inside)
    for i in range(t):
        y = tl.load(x + i * x_frame + place, mask=inside, other=0.0)
        if NORM:
            wide = y.to(tl.float32)
            length = tl.sqrt(tl.sum(wide * wide, axis=1))
            # weight is a float only without NORM
            wide = wide / tl.maximum(length, 1e-12)[:, None] * weight[None, :]  # pyright: ignore[reportIndexIssue]
            y = (wide * tl.sigmoid(wide)).to(y.dtype)
        tl.store(out + (i + MEMORY) * out_frame + place, y, mask=inside)
        if KEEP:
            if i >= t - MEMORY:
                tl.store(before + (i - t + MEMORY) * before_frame + place, y, mask=inside)


def extend(
    x: Tensor,
    gamma: Tensor | None,
    before: Tensor | None,
    *,
    memory: int,
    keep: bool,
    out: Tensor | None = None,
) -> Tensor:
    """`[before, silu(norm(x))]`, `[memory + T, H, W, C]`, in one pass. With `keep` its last frames are
    written to `before`.

    x: `[T, H, W, C]`, each frame in memory order. gamma: `[C]`, already times sqrt(C); None means x
    unchanged. before: `[memory, H, W, C]`, each frame in memory order; None means zeros, and nothing is kept.
    out: the tensor to write to; None means a new one.
    """
    t, *_, channels = x.shape
    positions = x[0].numel() // channels
    out = x.new_empty(t + memory, *x.shape[1:]) if out is None else out
    block_c = triton.next_power_of_2(channels)
    block = max(POSITIONS_TIMES_CHANNELS // block_c, 1)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        kernel: Any = _extend  # triton.jit returns an object that takes its grid in brackets
        kernel[(triton.cdiv(positions, block),)](
            x,
            gamma if gamma is not None else x,
            before if before is not None else x,
            out,
            t,
            positions,
            x.stride(0),
            before.stride(0) if before is not None else 0,
            out.stride(0),
            C=channels,
            BLOCK_C=block_c,
            BLOCK=block,
            MEMORY=memory,
            HAS_BEFORE=before is not None,
            NORM=gamma is not None,
            KEEP=keep and before is not None,
            num_warps=8,
        )
    return out


def work_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: Triton also needs a C compiler and a card that it supports."""
    try:
        extend(
            torch.ones(1, 1, 1, 16, device=device), torch.ones(16, device=device), None, memory=2, keep=False
        )
    except Exception:  # whatever Triton, the compiler or the driver says
        return False
    return True
