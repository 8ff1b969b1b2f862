"""Rows of a frame over a group of processes, exactly: no overlap, no blending.

A 3x3 convolution needs one row of each neighbour (a halo), and the one attention block of the middle needs the keys and values of the whole
frame. Everything else in the Wan VAE's decoder looks at one position only. What it remembers of past frames stays with its rows.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .errors import AptError


class Rows:
    """Who has which rows of frames `[..., H, W, C]`, at any multiple of the latents' height. The interface of `decoder_layers.Whole`.

    height: of the latents; where it does not divide evenly, the first processes have one row more.
    Raises AptError for fewer rows than processes.
    """

    index = 0

    def __init__(self, group: ProcessGroup, height: int):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        if height < self.size:
            raise AptError(f"{self.size} processes cannot share {height} rows of latents: decode with at most {height} processes.")
        self.counts = [height // self.size + (rank < height % self.size) for rank in range(self.size)]
        self.above, self.below = (dist.get_global_rank(group, r) if 0 <= r < self.size else None for r in (self.rank - 1, self.rank + 1))

    def cut(self, latents: Tensor) -> Tensor:
        """Whole latents -> this process's rows of them."""
        return latents.split(self.counts, dim=-3)[self.rank].contiguous()

    def all(self, x: Tensor) -> Tensor:
        """This process's rows of anything -> all rows, on every process."""
        scale = x.shape[-3] // self.counts[self.rank]
        most = max(self.counts) * scale
        x = F.pad(x, (0, 0, 0, 0, 0, most - x.shape[-3])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat([part[..., : count * scale, :, :] for part, count in zip(parts, self.counts)], dim=-3)

    def halo(self, x: Tensor) -> tuple[Tensor, int]:
        """This process's rows with one more above and below, the neighbours' or zeros at the frame's edge; and 0, the padding left to do."""
        top, bottom = x[..., :1, :, :].contiguous(), x[..., -1:, :, :].contiguous()
        above, below = torch.zeros_like(top), torch.zeros_like(bottom)
        transfers = []
        for peer, own, other in ((self.above, top, above), (self.below, bottom, below)):
            if peer is not None:
                transfers += [dist.P2POp(dist.isend, own, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        return torch.cat((above, x, below), dim=-3), 0

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """x itself: no row is lost to a halo."""
        return x
