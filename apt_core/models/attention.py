"""Which attention kernel the transformers use: the fastest installed one that fits the card, the dtype, and a
backward pass where one is needed.
"""

from difflib import get_close_matches
from typing import NamedTuple

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ..errors import AptError

AUTO = "auto"
NATIVE = "native"
"""PyTorch's scaled_dot_product_attention, and its choice of kernel."""
PACKAGES = {
    "flash": ("flash_attn_func", "flash-attn"),
    "flash_varlen": ("flash_attn_varlen_func", "flash-attn"),
    "_flash_3": ("flash_attn_3_func", "FlashAttention 3"),
    "_flash_varlen_3": ("flash_attn_3_varlen_func", "FlashAttention 3"),
    "sage": ("sageattn", "sageattention"),
    "xformers": ("xops", "xformers"),
    "flex": ("flex_attention", "torch 2.5"),
    "_native_npu": ("npu_fusion_attention", "torch_npu"),
    "_native_xla": ("xla_flash_attention", "torch_xla"),
}
"""What diffusers has of a backend's package, None where that is missing or does not load; and the package.
The other names need none.
"""
FORWARD_ONLY = ("_flash_3", "sage", "_sage")
"""How the names begin that have no backward pass in diffusers. FlashAttention 3 has one, but not behind
diffusers' `_flash_3`.
"""
SIXTEEN_BITS_ON_A_CARD = ("flash", "_flash", "sage", "_sage", "_native_cudnn")


class Backend(NamedTuple):
    """name: diffusers'; note: why it is not the one that one would expect, "" where it is."""

    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def best_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, training: bool = False
) -> str:
    """diffusers' name of the attention backend for passes in `dtype` on `device`; training: with a backward
    pass.

    On Hopper FlashAttention 3 where it is installed and loads (not in training: FORWARD_ONLY), else 2, else
    cuDNN; on newer cards cuDNN; on Ampere and Ada FlashAttention 2. Everything else (CPU, fp32, AMD, odd
    heads, old cards) is left to PyTorch.
    """
    return next(
        (name for name in _by_speed(device, dtype, head_dim) if not (training and _forward_only(name))),
        NATIVE,
    )


def choose_backend(
    wanted: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int = 128,
    training: bool = False,
) -> Backend:
    """The backend for a setting: a name of diffusers', or "auto" (None) for `best_backend`. One without a
    backward pass is no choice for training:
    then the best one that has it is taken, and the note says so.

    Raises AptError for a name that is none, a package that is not there, and a device or dtype that the
    kernel is not for.
    """
    best = best_backend(device, dtype, head_dim, training)
    if wanted is None or wanted == AUTO:
        first = next(iter(_by_speed(device, dtype, head_dim)), NATIVE)
        return Backend(best, "" if first == best else f"{first} has no backward pass")
    check_name(wanted)
    package = _package(wanted)
    if package and not _installed(wanted):
        raise AptError(
            f"attention backend {wanted} needs {package[1]}, which is not installed or does not load: install it, or use {best}."
        )
    device = torch.device(device)
    if wanted.startswith(SIXTEEN_BITS_ON_A_CARD) and (device.type != "cuda" or dtype.itemsize != 2):
        computes = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise AptError(
            f"attention backend {wanted} computes in 16 bits on a CUDA card only, and this is {computes}: use {best}."
        )
    if training and _forward_only(wanted):
        return Backend(best, f"{wanted} has no backward pass")
    return Backend(wanted)


def check_name(name: str) -> None:
    """Raises AptError unless `name` is "auto" or one of diffusers' attention backends that needs no download."""
    known = [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]
    if name in (AUTO, *known):
        return
    if name.endswith("_hub") and name in {backend.value for backend in AttentionBackendName}:
        raise AptError(
            f"attention backend {name} downloads its kernel, which nothing here does: install a package, and use one of {', '.join(known)}."
        )
    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise AptError(f"there is no attention backend {name!r}{hint}: use {AUTO}, or one of {', '.join(known)}.")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """Attention without a mask: q [B, m, heads, channels], k and v [B, n, heads, channels] -> [B, m, heads,
    channels].

    backend: diffusers' name of one; by default the one that is set for the process.
    """
    # diffusers asks for a member of its enumeration, and makes one of a name.
    return dispatch_attention_fn(q, k, v, backend=backend)  # pyright: ignore[reportArgumentType]


def _by_speed(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """What is installed and fits, the fastest first."""
    device = torch.device(device)
    if (
        device.type != "cuda"
        or torch.version.hip
        or dtype not in (torch.float16, torch.bfloat16)
        or head_dim % 8
        or head_dim > 128
    ):
        return []
    generation, _ = torch.cuda.get_device_capability(device)
    if generation >= 10:  # FlashAttention 3 is for Hopper alone
        return ["_native_cudnn"]
    order = {9: ["_flash_3", "flash", "_native_cudnn"], 8: ["flash"]}.get(generation, [])
    return [name for name in order if _installed(name)]


def _package(name: str) -> tuple[str, str] | None:
    return PACKAGES["sage"] if name.startswith(("sage", "_sage")) else PACKAGES.get(name)


def _installed(name: str) -> bool:
    package = _package(name)
    return package is None or getattr(attention_dispatch, package[0], None) is not None


def _forward_only(name: str) -> bool:
    return name.startswith(FORWARD_ONLY)
