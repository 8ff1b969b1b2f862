"""Which weights of a transformer stay in fp32 when the others are in 16 bits: those that its class lists in
diffusers' `_keep_in_fp32_modules`.
"""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def stays_fp32(network: nn.Module | type, name: str) -> bool:
    """Whether diffusers would keep this weight in fp32 when the others are in 16 bits. network: a
    WanBackbone, an MMDiTBackbone, or one of these classes.

    For Wan these are the time embedder, modulation tables and affine norms. A bf16 embedder would confuse
    timestep 701 with a value near it.
    """
    return not set(name.split(".")).isdisjoint(getattr(network, "_keep_in_fp32_modules", None) or ())


def weight_dtype(network: nn.Module | type, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one weight when the network is in `dtype`."""
    return torch.float32 if dtype.itemsize == 2 and stays_fp32(network, name) else dtype


@torch.no_grad()
def cast(network: Network, dtype: torch.dtype) -> Network:
    """Cast the weights of a network in place (also on "meta") and return it. Unlike `.to(dtype)`, this keeps
    the fp32 weights in fp32 (`stays_fp32`).
    """
    for name, p in network.named_parameters():
        p.data = p.data.to(weight_dtype(network, name, dtype))
    return network
