"""A transformer made fast for inference: attention backend, fused projections, fp8, compiled blocks with a cache that outlives the process."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import nn

from .attention import best_backend
from .context_parallel import enable
from .fp8 import check_fp8, to_fp8
from .mmdit import MMDiTBackbone


@dataclass(frozen=True)
class Speed:
    """backend: of attention, diffusers' name, None for the best one installed; compile: the blocks, by torch.compile;
    fp8: weights and products of the blocks. All but fp8 leave the result as it is, up to rounding."""

    backend: str | None = None
    compile: bool = False
    fp8: bool = False


@torch.no_grad()
def make_fast(model: nn.Module, device: torch.device, speed: Speed = Speed(), group=None) -> nn.Module:
    """Prepares a WanBackbone or MMDiTBackbone, in place, for forward passes without gradients on `device`; returns it.

    group: processes that share each sample's tokens. Raises AptError where the card has no fp8 and where the group does not divide the heads.
    """
    fuse_projections(model)
    model.eval().requires_grad_(False)
    if speed.fp8:
        to_fp8(model, check_fp8(device))
    if group is not None and group.size() > 1:
        enable(model, group)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.use_attention(speed.backend or best_backend(device, dtype, model.config.attention_head_dim))
    if speed.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


@torch.no_grad()
def fuse_projections(model: nn.Module) -> None:
    """One product for queries, keys and values that read the same tokens, with the weights of the three in the place of theirs."""
    for block in model.blocks:
        for stream in (block.visual, block.text) if isinstance(model, MMDiTBackbone) else ():
            stream.fuse()
        for attention in () if isinstance(model, MMDiTBackbone) else (block.attn1, block.attn2):
            attention.fuse_projections()
            attention.to_k = attention.to_v = None
            if not attention.is_cross_attention:
                attention.to_q = None


class CompileCache:
    """What torch has compiled, in one file for each model, card and version of torch: a second start does not compile again."""

    def __init__(self, folder: Path, model: nn.Module, device: torch.device, speed: Speed) -> None:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        what = f"{type(model).__name__} {sorted(model.config.items(), key=str)} {card} {torch.__version__} {speed}"
        self.path = folder / f"{blake2b(what.encode(), digest_size=16).hexdigest()}.compiled"
        self._shapes: set[tuple] = set()

    def load(self) -> None:
        """To be called before the first run. A damaged or foreign file only means that torch compiles again."""
        with suppress(OSError, RuntimeError, ValueError):
            torch.compiler.load_cache_artifacts(self.path.read_bytes())

    def ran(self, shape: tuple) -> None:
        """Say that the model has run on this shape; after a new one, all that is compiled is written down."""
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        if (saved := torch.compiler.save_cache_artifacts()) is not None:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".partial", delete=False) as file:
                    file.write(saved[0])
                Path(file.name).replace(self.path)
