"""Which attention kernel the transformers use: the fastest installed one that fits the card and the dtype."""

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

NATIVE = "native"
"""PyTorch's scaled_dot_product_attention, and its choice of kernel."""


def best_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> str:
    """diffusers' name of the attention backend for forward passes in `dtype` on `device`.

    On Hopper FlashAttention 3 where it is installed and loads, else cuDNN; on newer cards cuDNN; on Ampere and Ada FlashAttention 2, likewise.
    Everything else (CPU, fp32, AMD, odd heads, old cards) is left to PyTorch.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 128:
        return NATIVE
    generation, _ = torch.cuda.get_device_capability(device)
    if generation == 9 and attention_dispatch.flash_attn_3_func:
        return "_flash_3"
    if generation >= 9:
        return "_native_cudnn"
    return "flash" if generation == 8 and attention_dispatch.flash_attn_func else NATIVE


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """Attention without a mask: q [B, m, heads, channels], k and v [B, n, heads, channels] -> [B, m, heads, channels].

    backend: diffusers' name of one; by default the one that is set for the process.
    """
    return dispatch_attention_fn(q, k, v, backend=backend)
