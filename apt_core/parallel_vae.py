"""The Wan VAE's decoder over a group of processes, each with some of the rows, exactly: no overlap, no blending.

A 3x3 convolution needs one row of each neighbour (a halo), and the one attention block of the middle needs the keys and values of the whole
frame. Everything else looks at one position only. The causal caches over time stay with their rows.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .errors import AptError


def enable(vae: AutoencoderKLWan, group: ProcessGroup) -> None:
    """Makes `vae.decode` compute over the group's processes, in place, under the same state dict. For inference, once for a VAE.

    Latents are whole and equal on every process, and so are the pixels that each gets; rows that do not divide evenly differ by one.
    A decode of fewer latent rows than processes raises AptError. The encoder stays as it is.
    """
    rows = Rows(group)
    for name, module in list(vae.decoder.named_modules()):
        if isinstance(module, WanAttentionBlock):
            vae.decoder.set_submodule(name, FrameAttention(module, rows))
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[1] > 1:
            vae.decoder.set_submodule(name, HaloConv3d(module, rows))
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            vae.decoder.set_submodule(name, HaloConv2d(module, rows))
    vae.post_quant_conv = FirstConv(vae.post_quant_conv, rows)
    vae.decoder.conv_out = LastConv(vae.decoder.conv_out, rows)


class Rows:
    """Who has which rows of the latents of this decode. In all tensors here, rows are the last dimension but one."""

    def __init__(self, group: ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.counts: list[int] = []  # of the latents, by process
        self.above, self.below = (dist.get_global_rank(group, r) if 0 <= r < self.size else None for r in (self.rank - 1, self.rank + 1))

    def cut(self, latents: Tensor) -> Tensor:
        """Whole latents -> this process's rows of them. Everything after follows this decode's counts."""
        height = latents.shape[-2]
        if height < self.size:
            raise AptError(f"{self.size} processes cannot share {height} rows of latents: decode with at most {height} processes.")
        self.counts = [height // self.size + (rank < height % self.size) for rank in range(self.size)]
        return latents.split(self.counts, dim=-2)[self.rank]

    def whole(self, x: Tensor) -> Tensor:
        """This process's rows of anything, at any multiple of the latents' height -> all rows, on every process."""
        scale = x.shape[-2] // self.counts[self.rank]
        most = max(self.counts) * scale
        x = F.pad(x, (0, 0, 0, most - x.shape[-2]))
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat([part[..., : count * scale, :] for part, count in zip(parts, self.counts)], dim=-2)

    def with_halo(self, x: Tensor) -> Tensor:
        """This process's rows with one more above and below: the neighbours', or zeros at the picture's edge."""
        top, bottom = x[..., :1, :].contiguous(), x[..., -1:, :].contiguous()
        above, below = torch.zeros_like(top), torch.zeros_like(bottom)
        transfers = []
        for peer, own, other in ((self.above, top, above), (self.below, bottom, below)):
            if peer is not None:
                transfers += [dist.P2POp(dist.isend, own, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        return torch.cat((above, x, below), dim=-2)


def _become(new: nn.Module, old: nn.Module, rows: Rows) -> None:
    """Give a module the settings, weights and submodules of another."""
    vars(new).update(vars(old))
    new.rows = rows


class HaloConv3d(WanCausalConv3d):
    """WanCausalConv3d of a 3x3 kernel on a process's rows."""

    def __init__(self, conv: WanCausalConv3d, rows: Rows):
        _become(self, conv, rows)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: [B, C, T, rows, W]; cache_x: up to two frames before it. Returns [B, C', T, rows, W]."""
        left, right, _, _, before, _ = self._padding
        if cache_x is not None:
            x, before = torch.cat((cache_x, x), dim=2), before - cache_x.shape[2]
        return nn.Conv3d.forward(self, F.pad(self.rows.with_halo(x), (left, right, 0, 0, before, 0)))


class HaloConv2d(nn.Conv2d):
    """A 3x3 convolution with zero padding on a process's rows."""

    def __init__(self, conv: nn.Conv2d, rows: Rows):
        _become(self, conv, rows)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, C, rows, W]. Returns [n, C', rows, W]."""
        return F.conv2d(self.rows.with_halo(x), self.weight, self.bias, padding=(0, self.padding[1]))


class FrameAttention(WanAttentionBlock):
    """The middle's attention: a process's rows ask the whole frame."""

    def __init__(self, block: WanAttentionBlock, rows: Rows):
        _become(self, block, rows)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, T, rows, W]. Returns the same shape."""
        frames = x.transpose(1, 2).flatten(0, 1)
        q, kv = self.to_qkv(self.norm(frames)).split((self.dim, 2 * self.dim), dim=1)
        k, v = self.rows.whole(kv).chunk(2, dim=1)
        q, k, v = (y.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for y in (q, k, v))  # [B T, 1, rows W, C]
        answer = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + self.proj(answer).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class FirstConv(WanCausalConv3d):
    """The 1x1x1 convolution before the decoder: whole latents in, a process's rows out."""

    def __init__(self, conv: WanCausalConv3d, rows: Rows):
        _become(self, conv, rows)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: [B, z, T, H, W]. Returns [B, z, T, rows, W]."""
        return super().forward(self.rows.cut(x), cache_x)


class LastConv(HaloConv3d):
    """The decoder's last convolution: a process's rows in, whole pictures out."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: [B, C, T, rows, W]. Returns [B, C', T, H, W]."""
        return self.rows.whole(super().forward(x, cache_x))
