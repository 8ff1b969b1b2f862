"""Backbones that no other program knows, as safetensors files. `own_kind` makes a Kind for a class; the MMDiT
is one.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AptError
from ..files.checkpoint_header import read_header
from ..files.contract import metadata_json, metadata_strings
from ..files.tensorfile import Header, check_count, check_shapes, read_tensors, write_tensors
from ..models.mmdit import MMDiTBackbone
from ..models.precision import cast, weight_dtype
from .backbones import Kind


def own_kind(name: str, words: str, model: type[nn.Module], build: Callable[..., nn.Module]) -> Kind:
    """Make a kind with files of this project alone: a safetensors file with the model's own keys, `apt` as in
    `checkpoint.save_generator`, and the model's arguments in the metadata entry `name`.

    model: a class of diffusers' ModelMixin and ConfigMixin that offers `models.backbone.Backbone`; words,
    build: see Kind. The kind's `save` raises AptError as `save_generator` does; its `load` raises it for a
    damaged file, another kind of file, and missing, extra or misshapen keys.
    """
    short = words.partition(" ")[2]

    def on_meta(path: str | Path, arguments: Mapping) -> nn.Module:
        try:
            with torch.device("meta"):
                return model(**arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AptError(
                f"{path}: {words} cannot be built from its config ({error}): export it again."
            ) from None

    def save(
        path: str | Path,
        network: nn.Module | Mapping[str, Tensor],
        config: Mapping,
        metadata: Mapping,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        state = network.state_dict() if isinstance(network, nn.Module) else dict(network)
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        check_shapes(
            path, _shapes(state), _shapes(on_meta(path, arguments).state_dict()), f"{short} of its config"
        )
        strings = metadata_strings(path, metadata) | {name: json.dumps(arguments)}
        write_tensors(path, {key: value.to(dtype) for key, value in state.items()}, strings)

    def without_weights(path: str | Path, header: Header | None = None) -> nn.Module:
        header = header or read_header(path)
        arguments = metadata_json(path, header.metadata, name)
        if not arguments:
            raise AptError(
                f"{path} is not {words} of this project (no metadata entry `{name}`): "
                "give a file that the trainer wrote for one."
            )
        check_count(path, "num_layers", arguments.get("num_layers"), header.shapes)
        network = on_meta(path, arguments)
        check_shapes(path, header.shapes, _shapes(network.state_dict()), f"{short} of its config")
        return network

    def load(
        path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> nn.Module:
        network = without_weights(path)
        if torch.device(device).type == "meta":
            return cast(network, dtype)
        tensors, _ = read_tensors(path)
        state = {
            key: value.to(device, weight_dtype(network, key, dtype), copy=True)
            for key, value in tensors.items()
        }
        network.load_state_dict(state, assign=True)
        return network.train()

    return Kind(
        name=name,
        words=words,
        is_model=lambda network: isinstance(network, model),
        is_file=lambda header: name in header.metadata,
        # diffusers sets config on the instance; its type is unknown to the checker
        config=lambda path, header: without_weights(path, header).config,  # pyright: ignore[reportArgumentType]
        load=load,
        save=save,
        build=build,
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def build_mmdit(
    layers: int,
    heads: int,
    head_dim: int,
    ffn: int,
    channels: int,
    text_dim: int,
    model: type[MMDiTBackbone] = MMDiTBackbone,
) -> MMDiTBackbone:
    """An untrained MMDiT, or a subclass of it. Positions get the paper's shares of a head. ffn is always 4
    times the width.
    """
    side = head_dim * 11 // 52 * 2  # 44 of 104 channels for rows and for columns
    axes = (head_dim - 2 * side, side, side)
    return model(layers, heads, head_dim, channels, channels, text_dim, axes_dims_rope=axes)


MMDIT_KIND = own_kind("mmdit", "an MMDiT", MMDiTBackbone, build_mmdit)
load_mmdit, save_mmdit = MMDIT_KIND.load, MMDIT_KIND.save
