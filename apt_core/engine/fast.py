"""Make a transformer fast for inference: attention backend, fused projections, fp8, and compiled blocks in a
cache that later processes reuse.
"""

import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..errors import AptError
from ..models.attention import best_backend
from ..models.backbone import as_backbone
from .context_parallel import enable
from .fp8 import check_fp8, to_fp8
from .torch_limits import allow_many_graphs


@dataclass(frozen=True)
class Speed:
    """backend: diffusers' name of the attention backend; None means the best one installed; compile: compile
    the blocks with torch.compile; fp8: weights and products of the blocks in fp8. Without fp8 the result
    stays the same, up to rounding.
    """

    backend: str | None = None
    compile: bool = False
    fp8: bool = False


@torch.no_grad()
def make_fast(
    model: nn.Module,
    device: torch.device,
    speed: Speed = Speed(),
    group=None,
    place: torch.device | None = None,
) -> nn.Module:
    """Prepare a Backbone, in place, for forward passes without gradients on `device`; return it.

    place: where its weights wait while they are not used; None means where they are. group: processes that
    share each sample's tokens. Raises AptError when the card has no fp8 and when the group size does not
    divide the heads.
    """
    backbone = as_backbone(model)
    backbone.fuse_projections()
    model.eval().requires_grad_(False)
    if speed.fp8:
        to_fp8(model, check_fp8(device), place)
    if place is not None:
        model.to(place)
    if group is not None and group.size() > 1:
        enable(model, group)
    dtype = backbone.patch_embedding.weight.dtype  # the dtype of the tokens; some weights stay in fp32
    backbone.use_attention(speed.backend or best_backend(device, dtype, backbone.config.attention_head_dim))
    if speed.compile:
        allow_many_graphs()
        for block in backbone.blocks:  # block.compile would also compile the hooks with BlockStream's moves
            block.forward = torch.compile(block.forward, dynamic=False)
    return model


def check_device(name: str | torch.device) -> None:
    """Raise AptError for a device that torch does not know or cannot use here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, TypeError):  # AssertionError: torch without CUDA
        raise AptError(
            f"torch cannot use the device {str(name)!r} here; use cpu, or install a torch for that device."
        ) from None


def check_compile(device: torch.device) -> None:
    """Raise AptError when torch has nothing to compile with: on a CPU a C++ compiler, elsewhere Triton."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise AptError(
                "compiling for a CPU needs a C++ compiler, and there is none: "
                "install g++, or leave compile out."
            ) from None
    elif find_spec("triton") is None:
        raise AptError(
            f"compiling for {device} needs Triton, which is not installed: install it, or leave compile out."
        )


def keep_compiled(folder: Path) -> None:
    """From now on, let this process keep everything that torch compiles in `folder`, so that a later process
    finds it.

    A TORCHINDUCTOR_CACHE_DIR that the user has set stays. Otherwise torch would use a folder of temporary
    files and set that variable itself. Raises AptError for a folder that cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AptError(
            f"{folder} cannot keep what is compiled ({error.strerror or error}): "
            "set APT_CACHE to a folder that can be written to."
        ) from None
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.path.abspath(default_cache_dir())):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
