"""Split the rows of frames over a group of processes, exactly: no overlap, no blending.

A 3x3 convolution needs one row of each neighbour (a halo), and the one attention block in the middle needs
the keys and values of the whole frame. All other parts of the Wan VAE's decoder see a single position. Past
frames are remembered with their rows.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any_only, tree_map_only

from ..errors import AptError


class Rows:
    """Which process has which rows of frames `[..., H, W, C]`, whose height is any multiple of the latents'.
    The interface is that of `decoder_layers.Whole`.

    height: of the latents; when it does not divide evenly, the first processes have one row more.
    exchanges: how often this process has exchanged data with the others. Frames on device "meta" (see
    `Shapes`) are exchanged as zeros on `device`, except for the first `skip` exchanges, which are left out.
    Raises AptError for fewer rows than processes.
    """

    index = 0

    def __init__(self, group: ProcessGroup, height: int, device: torch.device, skip: int = 0):
        self.group, self.size, self.rank, self.device, self.skip = (
            group,
            group.size(),
            group.rank(),
            device,
            skip,
        )
        self.exchanges = 0
        if height < self.size:
            raise AptError(
                f"{self.size} processes cannot share {height} rows of latents: "
                f"decode with at most {height} processes."
            )
        self.counts = [height // self.size + (rank < height % self.size) for rank in range(self.size)]
        self.above, self.below = (
            dist.get_global_rank(group, r) if 0 <= r < self.size else None
            for r in (self.rank - 1, self.rank + 1)
        )

    def cut(self, latents: Tensor) -> Tensor:
        """Cut whole latents to this process's rows."""
        return latents.split(self.counts, dim=-3)[self.rank].contiguous()

    def all(self, x: Tensor) -> Tensor:
        """Join the rows of all processes, on every process. For tensors of any kind."""
        scale = x.shape[-3] // self.counts[self.rank]
        most = max(self.counts) * scale
        x = F.pad(x, (0, 0, 0, 0, 0, most - x.shape[-3])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._exchange(lambda parts, x: dist.all_gather(parts, x, group=self.group), parts, x)
        return torch.cat(
            [part[..., : count * scale, :, :] for part, count in zip(parts, self.counts)], dim=-3
        )

    def halo(self, x: Tensor) -> tuple[Tensor, int]:
        """This process's rows with one more above and below: the neighbours' rows, or zeros at the frame's
        edge. Also returns 0, the padding that is left to do.
        """
        top, bottom = x[..., :1, :, :].contiguous(), x[..., -1:, :, :].contiguous()
        above, below = torch.zeros_like(top), torch.zeros_like(bottom)
        self._exchange(self._with_neighbours, above, top, bottom, below)
        return torch.cat((above, x, below), dim=-3), 0

    def _with_neighbours(self, above: Tensor, top: Tensor, bottom: Tensor, below: Tensor) -> None:
        transfers = []
        for peer, own, other in ((self.above, top, above), (self.below, bottom, below)):
            if peer is not None:
                transfers += [
                    dist.P2POp(dist.isend, own, peer, self.group),
                    dist.P2POp(dist.irecv, other, peer, self.group),
                ]
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()

    def _exchange(self, work: Callable, *buffers: Tensor | list[Tensor]) -> None:
        if not tree_any_only(Tensor, lambda x: x.is_meta, buffers):
            work(*buffers)
        elif self.exchanges >= self.skip:
            work(
                *tree_map_only(
                    Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=self.device), buffers
                )
            )
        self.exchanges += 1  # a failed exchange does not count

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """x itself, because no row is lost to a halo."""
        return x


def any_failed(failed: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether any process of the group reports a failure."""
    flag = torch.tensor(int(failed), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag)


class Shapes(TorchDispatchMode):
    """While it is active, everything computed from a tensor on device "meta" is on "meta" too, whatever
    device the weights are on. This computes shapes without numbers.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if tree_any_only(Tensor, lambda x: x.is_meta, (args, kwargs)):
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if x.is_meta else torch.empty_like(x, device="meta"), (args, kwargs)
            )
        return function(*args, **kwargs)
