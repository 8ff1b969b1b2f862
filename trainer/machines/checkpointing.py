"""Activation checkpoints that wait in the CPU's memory."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _Parked:
    """A block's input: itself for the forward pass, a copy from the CPU's memory for the recomputation.

    checkpoint() holds what it is given until the backward pass, so it is given this box and not the tensor.
    """

    def __init__(self, tokens: Tensor):
        self.device, self.needs_grad = tokens.device, tokens.requires_grad
        self.live: Tensor | None = tokens
        self.copy = torch.empty_like(
            tokens, device="cpu", pin_memory=self.device.type == "cuda", requires_grad=False
        )
        self.copy.copy_(tokens.detach(), non_blocking=True)

    def take(self) -> Tensor:
        live, self.live = self.live, None
        if live is not None:
            return live
        return self.copy.to(self.device, non_blocking=True).requires_grad_(self.needs_grad)


def offloaded(block: nn.Module, tokens: Tensor, *rest):
    """`block(tokens, *rest)`, recomputed in the backward pass from a copy of `tokens` (any shape) in the
    CPU's memory.

    For diffusers' `enable_gradient_checkpointing(offloaded)`: 14B at 720p starts its blocks from 18 GB a
    sample and pass.
    """
    return checkpoint(_run, block, _Parked(tokens), *rest, use_reentrant=False)


def _run(block: nn.Module, parked: _Parked, *rest):
    return block(parked.take(), *rest)
