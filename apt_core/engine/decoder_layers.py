"""The layers of the Wan VAE's decoder, on frames `[T, H, W, C]` in memory order, which is channels-last for
all convolutions.

A layer is called with frames and with a `Stream`, in which it may remember frames. The numbers equal those of
diffusers' layers.
"""

from collections import deque
from collections.abc import Iterator
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import AptError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        DupUp3D,
        WanAttentionBlock,
        WanDecoder3d,
        WanResample,
        WanResidualBlock,
        WanRMS_norm,
    )

MEMORY = 2
"""How many earlier frames a causal convolution with three taps sees."""


class Stream:
    """What one clip carries from call to call: the last two frames that each causal convolution saw. Frames
    before the clip are zeros.

    first, last: whether this call has the clip's first or last latent frame. rows: a `Whole`, `Bands` or
    `parallel_vae.Rows`.
    device: where the remembered frames are kept; None means with the frames. kernels: the module of that name
    on CUDA; None means the same in torch.
    """

    def __init__(self, rows, device: torch.device | None = None, kernels: ModuleType | None = None):
        self.rows, self.device, self.kernels = rows, device, kernels
        self.first = self.last = True
        self.memory: dict[tuple[int, int], Tensor] = {}
        self.kept: Tensor | None = None

    def extend(self, layer: "CausalConv", x: Tensor, gamma: Tensor | None) -> Tensor:
        """`silu(norm(x))`, or x itself without gamma, with the earlier frames in front. A single frame with
        none before it is returned alone.
        """
        key = (layer.index, self.rows.index)
        before = self.memory.get(key)
        alone = before is None and len(x) == 1
        if before is None and not self.last:
            before = self.memory[key] = x.new_zeros(MEMORY, *x.shape[1:], device=self.device or x.device)
        if alone:
            frames = self._activate(x, gamma, x.new_empty(x.shape))
        elif self.kernels and not self.device:
            return self.kernels.extend(x, gamma, before, memory=MEMORY, keep=not self.last)
        else:
            frames = x.new_empty(MEMORY + len(x), *x.shape[1:])
            frames[:MEMORY] = 0 if before is None else before
            self._activate(x, gamma, frames[MEMORY:])
        if before is not None and not self.last:
            before[-len(frames) :] = frames[-MEMORY:]
        return frames

    def _activate(self, x: Tensor, gamma: Tensor | None, out: Tensor) -> Tensor:
        if self.kernels:
            return self.kernels.extend(x, gamma, None, memory=0, keep=False, out=out)
        if gamma is None:
            return out.copy_(x)
        if x.dtype.itemsize > 2:
            return F.silu(rms_norm(x, gamma, out), inplace=True)
        # Rounded only once; in fp32, for one frame at a time.
        for source, target in [(x, out)] if torch.compiler.is_compiling() else zip(x, out):
            wide = source.float()
            target.copy_(F.silu(rms_norm(wide, gamma, wide), inplace=True))
        return out


class Whole:
    """All rows of the frames at once; the interface of ways to divide them."""

    index = 0
    exchanges = 0  # with other processes; see Rows

    def cut(self, latents: Tensor) -> Tensor:
        """Cut whole latents to this part's rows."""
        return latents

    def halo(self, x: Tensor) -> tuple[Tensor, int]:
        """The frames for a convolution of three rows, and how many rows of zeros it must still pad."""
        return x, 1

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """x with the same rows as a parallel path whose convolutions hold back `rows` rows for their
        halos.
        """
        return x

    def all(self, x: Tensor) -> Tensor:
        """Join this part's rows to the whole frame."""
        return x


class Bands(Whole):
    """Bands of rows from top to bottom. The last row of a band lacks its lower neighbour, so a convolution
    returns it together with the next band.
    """

    def __init__(self, count: int):
        self.count, self.index = count, 0
        self.carried: deque[Tensor] = deque()  # from the band above, in the order in which the layers need it

    @property
    def top(self) -> bool:
        return self.index == 0

    @property
    def bottom(self) -> bool:
        return self.index == self.count - 1

    def halo(self, x: Tensor) -> tuple[Tensor, int]:
        zeros = x.new_zeros(len(x), 1, *x.shape[2:])
        x = torch.cat([zeros if self.top else self.carried.popleft(), x] + [zeros] * self.bottom, dim=1)
        self._carry(x, 2)
        return x, 0

    def delay(self, x: Tensor, rows: int) -> Tensor:
        if not self.top:
            x = torch.cat([self.carried.popleft(), x], dim=1)
        self._carry(x, rows)
        return x if self.bottom else x[:, :-rows]

    def _carry(self, x: Tensor, rows: int) -> None:
        if not self.bottom:
            self.carried.append(x[:, -rows:].clone())


def rms_norm(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """`sqrt(C) x / |x| gamma` over the last dimension, into `out`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
    return torch.div(x, length, out=out).mul_(gamma)


def _gamma(norm: "WanRMS_norm") -> Tensor:
    """The norm's weights times sqrt(C), not in 16 bits."""
    return (norm.gamma.to(torch.promote_types(norm.gamma.dtype, torch.float32)) * norm.scale).flatten()


class CausalConv:
    """A WanCausalConv3d with three taps in time, after RMSNorm and SiLU if a norm is given.

    On a CPU it adds one 2-D convolution per tap, which is many times faster there; elsewhere it is one 3-D
    convolution. It uses the VAE's own weight, in the layout that suits this.
    """

    def __init__(self, conv: nn.Conv3d, index: int, norm: "WanRMS_norm | None" = None):
        self.index, self.bias, self.gamma = index, conv.bias, None if norm is None else _gamma(norm)
        self.channels, self.out_channels, self.square = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[1] > 1,
        )
        self.by_taps = conv.weight.device.type == "cpu"
        weight = conv.weight.data
        if self.by_taps:
            # every tap channels-last
            conv.weight.data = weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)
        else:
            conv.weight.data = weight.contiguous(memory_format=torch.channels_last_3d)
        self.weight = conv.weight

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        count = len(x)
        frames = stream.extend(self, x, self.gamma)
        frames, pad = stream.rows.halo(frames) if self.square else (frames, 0)
        padding = (pad, int(self.square))
        if not self.by_taps and len(frames) > 1:
            return (
                F.conv3d(frames.permute(3, 0, 1, 2)[None], self.weight, self.bias, padding=(0, *padding))[0]
                .permute(1, 2, 3, 0)
                .contiguous()
            )
        # no copy when it is used tap by tap
        taps = [
            tap.contiguous(memory_format=torch.channels_last) for tap in self.weight.unbind(2)[-len(frames) :]
        ]
        frames = frames.permute(0, 3, 1, 2)
        out = F.conv2d(frames[-count:], taps[-1], self.bias, padding=padding)
        if len(frames) > count:
            for i in range(MEMORY):
                out += F.conv2d(frames[i : i + count], taps[i], padding=padding)
        return out.permute(0, 2, 3, 1).contiguous()


class Pointwise:
    """A convolution that sees a single position."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d):
        self.weight, self.bias = conv.weight.flatten(1), conv.bias

    def __call__(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Residual:
    """A WanResidualBlock."""

    def __init__(self, block: "WanResidualBlock", number: Iterator[int]):
        self.conv1 = CausalConv(block.conv1, next(number), block.norm1)
        self.conv2 = CausalConv(block.conv2, next(number), block.norm2)
        self.shortcut = (
            None if isinstance(block.conv_shortcut, nn.Identity) else Pointwise(block.conv_shortcut)
        )

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv2(self.conv1(x, stream), stream)
        y += stream.rows.delay(self.shortcut(x) if self.shortcut else x, rows=2)
        return y


class Attention:
    """The middle's WanAttentionBlock, one frame at a time, so that only one frame's scores are in memory."""

    def __init__(self, block: "WanAttentionBlock"):
        self.gamma, self.qkv, self.project = (
            _gamma(block.norm),
            Pointwise(block.to_qkv),
            Pointwise(block.proj),
        )

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        qkv = self.qkv(rms_norm(x, self.gamma, torch.empty_like(x)))
        out = torch.empty_like(x)
        for frame, result in zip(qkv, out):
            q, kv = frame.split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
            k, v = stream.rows.all(kv[None])[0].chunk(2, dim=-1)
            q, k, v = (y.flatten(0, 1)[None, None].contiguous() for y in (q, k, v))
            result.copy_(F.scaled_dot_product_attention(q, k, v).view(result.shape))
        return self.project(out).add_(x)


class Upsample:
    """A WanResample: doubles all frames except the clip's first, then doubles rows and columns.

    Nearest-exact upsampling followed by a 3x3 convolution equals four 2x2 convolutions of the small frames,
    one for each position in a square of four pixels, with sums of the 3x3's weights. This takes 16/36 of the
    work and stores nothing upsampled.
    """

    def __init__(self, resample: "WanResample", number: Iterator[int]):
        self.time = CausalConv(resample.time_conv, next(number)) if hasattr(resample, "time_conv") else None
        conv = cast(nn.Conv2d, cast(nn.Sequential, resample.resample)[1])
        full = conv.weight.float()
        # [position, tap of 2, tap of 3]
        rows = full.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        weight = torch.einsum("ocyx,iay,jbx->ijocab", full, rows, rows).flatten(0, 2)
        self.weight = weight.to(conv.weight.dtype, memory_format=torch.channels_last)
        self.bias = cast(Tensor, conv.bias).repeat(4)

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time:
            x = self._in_time(self.time, x, stream)
        x, pad = stream.rows.halo(x)
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=(pad, 1)).permute(0, 2, 3, 1)
        t, height, width = y.shape[0], y.shape[1] - 1, y.shape[2] - 1
        parts = y.unflatten(-1, (2, 2, -1))
        out = y.new_empty(t, height, 2, width, 2, parts.shape[-1])
        for i in range(2):
            for j in range(2):
                out[:, :, i, :, j] = parts[:, i : i + height, j : j + width, i, j]
        return out.view(t, 2 * height, 2 * width, -1)

    def _in_time(self, conv: CausalConv, x: Tensor, stream: Stream) -> Tensor:
        rest = x[1:] if stream.first else x
        if not len(rest):
            return x
        rest = rearrange(conv(rest, stream), "n h w (two c) -> (n two) h w c", two=2)
        return torch.cat([x[:1], rest]) if stream.first else rest


class Keep:
    """The start of a Wan 2.2 up block: keeps the frames for the shortcut at its end."""

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        stream.kept = x
        return x


class Repeat:
    """The end of a Wan 2.2 up block: adds the kept frames, with each pixel repeated (a DupUp3D whose number
    of channels stays the same or is divided).
    """

    def __init__(self, shortcut: "DupUp3D", lost: int):
        if shortcut.in_channels % shortcut.out_channels:
            raise AptError(
                f"the VAE's decoder goes from {shortcut.in_channels} to {shortcut.out_channels} channels, "
                "which is not supported: "
                "give a VAE whose number of channels stays the same or is divided."
            )
        self.frames, self.repeats, self.step, self.lost = (
            shortcut.factor_t,
            shortcut.repeats,
            shortcut.in_channels // shortcut.out_channels,
            lost,
        )

    def __call__(self, y: Tensor, stream: Stream) -> Tensor:
        assert stream.kept is not None  # the block's Keep has set it
        x, stream.kept = stream.rows.delay(stream.kept, self.lost), None
        skip = self.frames - 1 if stream.first else 0  # only the last copy of the first frame stays
        fine = y.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        for a in range(self.frames):
            source = x[1:] if a < skip else x
            for i in range(2):
                for j in range(2):
                    channel = ((a * 2 + i) * 2 + j) // self.repeats
                    # += on the slice would write twice
                    fine[(a - skip) % self.frames :: self.frames, :, i, :, j].add_(
                        source[..., channel :: self.step]
                    )
        return y


class Head:
    """Turns the last resolution's frames into pictures `[n, H, W, 3]` in [-1, 1], in the model's dtype."""

    def __init__(self, decoder: "WanDecoder3d", patch: int | None, number: Iterator[int]):
        self.conv, self.patch = CausalConv(decoder.conv_out, next(number), decoder.norm_out), patch or 1

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv(x, stream).clamp_(-1, 1)
        y = rearrange(y, "n h w (c pw ph) -> n (h ph) (w pw) c", ph=self.patch, pw=self.patch)
        return stream.rows.all(y)


def decoder_layers(vae) -> tuple[list, list]:
    """The layers from denormalised latents to pixels, in two lists: those before the last two resolutions,
    and the rest, which needs nearly all of the memory.
    """
    decoder, number = vae.decoder, count()
    first, second = decoder.mid_block.resnets
    quant, conv = Pointwise(vae.post_quant_conv), CausalConv(decoder.conv_in, next(number))
    levels = [
        [
            quant,
            conv,
            Residual(first, number),
            Attention(decoder.mid_block.attentions[0]),
            Residual(second, number),
        ]
    ]
    levels += [_level(block, number) for block in decoder.up_blocks]
    levels[-1].append(Head(decoder, vae.config.patch_size, number))
    return sum(levels[:-2], []), sum(levels[-2:], [])


def _level(block: Any, number: Iterator[int]) -> list:
    """block: a WanUpBlock or a WanResidualUpBlock."""
    layers: list = [Residual(resnet, number) for resnet in block.resnets]
    shortcut = getattr(block, "avg_shortcut", None)
    upsampler = block.upsampler if hasattr(block, "upsampler") else block.upsamplers and block.upsamplers[0]
    if upsampler:
        layers.append(Upsample(upsampler, number))
    return [Keep(), *layers, Repeat(shortcut, lost=2 * len(block.resnets) + 1)] if shortcut else layers
