"""An MMDiT as a safetensors file: its own keys, its arguments in the metadata entry `mmdit`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AptError
from ..files.checkpoint_header import read_header
from ..files.contract import metadata_json, metadata_strings
from ..files.tensorfile import check_count, check_shapes, read_tensors, write_tensors
from ..models.mmdit import MMDiTBackbone
from ..models.precision import cast, weight_dtype
from .backbones import Kind


def save_mmdit(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    config: Mapping,
    metadata: Mapping,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one safetensors file, atomically: the model's own keys, `apt` as in `checkpoint.save_generator`,
    its arguments in `mmdit`.

    No other program knows this architecture. Raises AptError as `save_generator` does.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    expected = _on_meta(path, arguments).state_dict()
    check_shapes(path, _shapes(state), _shapes(expected), "MMDiT of its config")
    strings = metadata_strings(path, metadata) | {"mmdit": json.dumps(arguments)}
    write_tensors(path, {key: value.to(dtype) for key, value in state.items()}, strings)


def load_mmdit(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> MMDiTBackbone:
    """The model of a file of `save_mmdit`; on device "meta", its shape alone, and no weight is read. dtype:
    as `load_transformer`'s.

    Raises AptError for a damaged file, another kind of file, and missing, extra or misshapen keys.
    """
    header = read_header(path)
    arguments = metadata_json(path, header.metadata, "mmdit")
    if not arguments:
        raise AptError(
            f"{path} is not an MMDiT of this project (no metadata entry `mmdit`): give a file that the trainer wrote for one."
        )
    check_count(path, "num_layers", arguments.get("num_layers"), header.shapes)
    model = _on_meta(path, arguments)
    check_shapes(path, header.shapes, _shapes(model.state_dict()), "MMDiT of its config")
    if torch.device(device).type == "meta":
        return cast(model, dtype)
    tensors, _ = read_tensors(path)
    state = {
        key: value.to(device, weight_dtype(model, key, dtype), copy=True) for key, value in tensors.items()
    }
    model.load_state_dict(state, assign=True)
    return model.train()


def _on_meta(path: str | Path, arguments: Mapping) -> MMDiTBackbone:
    try:
        with torch.device("meta"):
            return MMDiTBackbone(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AptError(f"{path}: no MMDiT can be built from its config ({error}): export it again.") from None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _is_file(path: Path) -> bool:
    return path.is_file() and "mmdit" in read_header(path).metadata


def _build(layers: int, heads: int, head_dim: int, ffn: int, channels: int, text_dim: int) -> MMDiTBackbone:
    side = head_dim * 11 // 52 * 2  # 44 of 104 channels for rows and for columns
    axes = (head_dim - 2 * side, side, side)
    return MMDiTBackbone(layers, heads, head_dim, channels, channels, text_dim, axes_dims_rope=axes)


MMDIT_KIND = Kind(
    name="mmdit",
    words="an MMDiT",
    is_model=lambda model: isinstance(model, MMDiTBackbone),
    is_file=_is_file,
    config=lambda path: load_mmdit(path, device="meta").config,
    load=load_mmdit,
    save=save_mmdit,
    build=_build,
)
