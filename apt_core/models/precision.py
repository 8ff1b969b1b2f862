"""Which weights of a transformer stay in fp32 when the rest is in 16 bits: those that its class names in
diffusers' `_keep_in_fp32_modules`.
"""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def stays_fp32(network: nn.Module | type, name: str) -> bool:
    """Whether diffusers would keep this weight in fp32 beside 16-bit ones. network: a WanBackbone, an
    MMDiTBackbone, or a class of them.

    Wan's: time embedder, modulation tables and affine norms. In bf16 the embedder would take timestep 701 for
    something near it.
    """
    return not set(name.split(".")).isdisjoint(getattr(network, "_keep_in_fp32_modules", None) or ())


def weight_dtype(network: nn.Module | type, name: str, dtype: torch.dtype) -> torch.dtype:
    """What dtype a weight has in a network of `dtype`."""
    return torch.float32 if dtype.itemsize == 2 and stays_fp32(network, name) else dtype


@torch.no_grad()
def cast(network: Network, dtype: torch.dtype) -> Network:
    """Cast the weights of a network in place, on "meta" too; returns it. Unlike `.to(dtype)` it leaves fp32
    what stays fp32.
    """
    for name, p in network.named_parameters():
        p.data = p.data.to(weight_dtype(network, name, dtype))
    return network
