"""Which attention kernel the transformers use: the fastest installed one that suits the card, the dtype and,
for training, has a backward pass.
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
"""PyTorch's scaled_dot_product_attention, which chooses its kernel itself."""
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
"""By backend: the attribute of diffusers' module that holds the package's function (None when the package is
missing or does not load), and the package's name. Backends that are not listed need no package.
"""
FORWARD_ONLY = ("_flash_3", "sage", "_sage")
"""How the names of backends without a backward pass in diffusers begin. FlashAttention 3 itself has one, but
diffusers' `_flash_3` does not expose it.
"""
SIXTEEN_BITS_ON_A_CARD = ("flash", "_flash", "sage", "_sage", "_native_cudnn")


class Backend(NamedTuple):
    """name: diffusers' name; note: why it is not the expected backend, or "" when it is."""

    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def best_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, training: bool = False
) -> str:
    """diffusers' name of the best attention backend for passes in `dtype` on `device`. training: the passes
    need gradients.

    On Hopper this is FlashAttention 3 where it is installed and loads (not in training, see FORWARD_ONLY),
    else FlashAttention 2, else cuDNN; on newer cards cuDNN; on Ampere and Ada FlashAttention 2. Everything
    else (CPU, fp32, AMD, unusual head sizes, old cards) uses PyTorch's own.
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
    """The backend for a setting: one of diffusers' names, or "auto" (or None) for `best_backend`. When
    training asks for a backend without a backward pass, it gets the best one that has a backward pass, and
    the note says so.

    Raises AptError for an unknown name, for a package that is not installed, and for a device or dtype that
    the kernel does not support.
    """
    best = best_backend(device, dtype, head_dim, training)
    if wanted is None or wanted == AUTO:
        first = next(iter(_by_speed(device, dtype, head_dim)), NATIVE)
        return Backend(best, "" if first == best else f"{first} has no backward pass")
    check_name(wanted)
    package = _package(wanted)
    if package and not _installed(wanted):
        raise AptError(
            f"attention backend {wanted} needs {package[1]}, which is not installed or does not load: "
            f"install it, or use {best}."
        )
    device = torch.device(device)
    if wanted.startswith(SIXTEEN_BITS_ON_A_CARD) and (device.type != "cuda" or dtype.itemsize != 2):
        computes = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise AptError(
            f"attention backend {wanted} needs 16-bit values on a CUDA card, but this "
            f"is {computes}: use {best}."
        )
    if training and _forward_only(wanted):
        return Backend(best, f"{wanted} has no backward pass")
    return Backend(wanted)


def check_name(name: str) -> None:
    """Raise AptError unless `name` is "auto" or one of diffusers' attention backends that need no
    download.
    """
    known = [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]
    if name in (AUTO, *known):
        return
    if name.endswith("_hub") and name in {backend.value for backend in AttentionBackendName}:
        raise AptError(
            f"attention backend {name} downloads its kernel, and this project downloads none: "
            f"install a package, and use one of {', '.join(known)}."
        )
    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise AptError(f"there is no attention backend {name!r}{hint}: use {AUTO}, or one of {', '.join(known)}.")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """Attention without a mask: q [B, m, heads, channels], k and v [B, n, heads, channels] -> [B, m, heads,
    channels].

    backend: one of diffusers' names; by default the one that is set for the process.
    """
    # diffusers declares a member of its enumeration, and also takes the name.
    return dispatch_attention_fn(q, k, v, backend=backend)  # pyright: ignore[reportArgumentType]


def _by_speed(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The backends that are installed and suit these values, the fastest first."""
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
