"""How much memory a decode may take, a count of what it takes, and the choice of a plan that fits."""

import math
from dataclasses import dataclass, replace

import torch

from .decoder_layers import MEMORY, Attention, CausalConv, Head, Keep, Pointwise, Repeat, Residual, Upsample

BAND = 12
"""The fewest rows of a band: the two last resolutions hold back 11 rows of the first one."""
SPARE = 0.85
"""The part of a budget that the count may fill. The rest is for the convolutions' workspaces, whose size is
unknown in advance.
"""

LARGEST = 2**31
"""From this many numbers in one tensor on, cuDNN's convolutions count in 64 bits, if it has such a
convolution at all.
"""


@dataclass(frozen=True)
class Plan:
    """How a decode runs, from fast to small: the latent frames per call, the bands of rows, and whether past
    frames are kept on the CPU.
    """

    frames: int
    bands: int = 1
    offload: bool = False

    def smaller(self, height: int, bands: bool = True) -> "Plan | None":
        """The next plan that needs less memory, for latents of `height` rows; None after the last. bands:
        whether rows may be divided.
        """
        most_bands = max(height * 4 // BAND, 1) if bands else 1
        if self.frames > 1:
            return replace(self, frames=self.frames // 2)
        if self.bands < most_bands:
            return replace(self, bands=min(2 * self.bands, most_bands))
        return None if self.offload else replace(self, offload=True)

    def __str__(self) -> str:
        bands = f" in {self.bands} bands of rows" if self.bands > 1 else ""
        return (
            f"{self.frames} latent frame{'s' * (self.frames > 1)} per "
            f"call{bands}{', what it remembers on the CPU' * self.offload}"
        )


def choose(
    layers: tuple[list, list],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    frames: int | None,
    budget: int | None,
    device: torch.device,
    bands: bool = True,
) -> Plan:
    """The fastest plan that fits, for latents of shape (clips, f, h, w), or the smallest plan if none fits.

    As long as fewer latent frames per call can avoid it, no plan makes a convolution read or write LARGEST
    numbers or more.

    frames: the number to begin with; None means all. budget: in bytes; None means what the device has free.
    On a CPU it takes one frame at a time, since more are hardly faster.
    bands: whether rows may be divided.
    """
    if budget is None and device.type == "cpu":
        return Plan(min(frames or 1, shape[1]))
    if budget is None:
        budget = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    plan = Plan(min(frames or shape[1], shape[1]))
    while plan.frames > 1 and largest(layers, shape, plan) >= LARGEST:
        plan = Plan(plan.frames - 1)
    while account(layers, shape, plan, dtype) > SPARE * budget:
        smaller = plan.smaller(shape[2], bands)
        if smaller is None:
            break
        plan = smaller
    return plan


def account(
    layers: tuple[list, list], shape: tuple[int, int, int, int], plan: Plan, dtype: torch.dtype
) -> int:
    """The peak of a call in the middle of a clip, in bytes, without weights and latents: what it computes
    with and what it remembers.
    """
    (low, high), (clips, f, h, w) = layers, shape
    t = min(plan.frames, f)
    first = Account()
    t, h, w, c = first.add(low, (t, h, w, 0))
    whole = Account()
    t, height, width, c_out = whole.add(high, (t, h, w, c))
    pixels = t * height * width * c_out
    if plan.bands == 1:
        peak = max(first.peak, whole.peak)
    else:
        band = Account(bands=True)
        band.add(high, (t, -(-h // plan.bands) + BAND, w, c))
        peak = max(first.peak, t * h * w * c + band.peak)
    if plan.frames < f and not plan.offload:
        peak += clips * (first.remembered + whole.remembered)
    return (peak + (clips + 1) * pixels) * dtype.itemsize + 4 * clips * pixels


def largest(layers: tuple[list, list], shape: tuple[int, int, int, int], plan: Plan) -> int:
    """How many numbers the largest tensor has that a convolution reads or writes."""
    (low, high), (_, f, h, w) = layers, shape
    account = Account()
    account.add(low + high, (min(plan.frames, f), h, w, 0))
    return account.largest


class Account:
    """Counts the numbers in memory at the peak of a call and between calls, and those of the largest tensor
    at a convolution.

    bands: whether rows are copied once more for the neighbouring bands.
    """

    def __init__(self, bands: bool = False):
        self.bands, self.peak, self.remembered, self.kept, self.largest = bands, 0, 0, 0, 0

    def add(self, layers: list, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Go through the layers with frames of shape (t, h, w, c); return the shape after them."""
        for layer in layers:
            shape = self.takers[type(layer)](self, layer, *shape)
        return shape

    def _hold(self, t: int, h: int, w: int, channels: int, more: int = 0) -> None:
        self.peak = max(self.peak, h * w * (t * channels + more) + self.kept)

    def _conv(self, conv: CausalConv, t: int, h: int, w: int, beside: int) -> None:
        """A convolution while `beside` numbers per position are in memory: its input, and its output, which
        counts twice when it is computed tap by tap.
        """
        self._hold(
            t,
            h,
            w,
            (1 + conv.by_taps) * conv.out_channels,
            beside + (1 + self.bands) * (t + MEMORY) * conv.channels,
        )
        self.remembered += MEMORY * h * w * conv.channels
        self.largest = max(self.largest, h * w * (t + MEMORY) * conv.channels, h * w * t * conv.out_channels)

    def _pointwise(self, layer: Pointwise, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        out, c = layer.weight.shape
        self._hold(t, h, w, out + c)
        return t, h, w, out

    def _causal(self, conv: CausalConv, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        self._conv(conv, t, h, w, beside=t * c)
        return t, h, w, conv.out_channels

    def _residual(self, block: Residual, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        out = block.conv1.out_channels
        self._conv(block.conv1, t, h, w, beside=t * c)
        self._conv(block.conv2, t, h, w, beside=t * (c + out))
        return t, h, w, out

    def _attention(self, layer: Attention, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        self._hold(t, h, w, 6 * c)
        return t, h, w, c

    def _upsample(self, layer: Upsample, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        before, out = t * c, layer.weight.shape[0]  # the output is for four pixels
        if layer.time:
            self._conv(layer.time, t, h, w, beside=before)
            t *= 2
            self._hold(t, h, w, 2 * c, before)
        self._hold(t, h, w, (1 + self.bands) * c + 2 * out, before)
        self.largest = max(self.largest, t * (h + 1) * (w + 1) * out)
        return t, 2 * h, 2 * w, out // 4

    def _keep(self, layer: Keep, *shape: int) -> tuple[int, ...]:
        self.kept = math.prod(shape)
        return shape

    def _repeat(self, layer: Repeat, *shape: int) -> tuple[int, ...]:
        self.kept = 0
        return shape

    def _head(self, head: Head, t: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
        self._conv(head.conv, t, h, w, beside=t * c)
        return t, h * head.patch, w * head.patch, head.conv.out_channels // head.patch**2

    takers = {
        Pointwise: _pointwise,
        CausalConv: _causal,
        Residual: _residual,
        Attention: _attention,
        Upsample: _upsample,
        Keep: _keep,
        Repeat: _repeat,
        Head: _head,
    }
