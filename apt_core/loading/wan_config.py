"""The arguments of a Wan transformer: told from the shapes and the metadata of its file, and as ComfyUI
guesses them.
"""

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AptError
from ..files import keys
from ..files.contract import metadata_json

# What ComfyUI takes for granted (comfy/model_detection.py, "wan2.1"). Its WanModel and diffusers have the
# same names for these.
HEAD_DIM = 128
ASSUMED = {"text_dim": 4096, "freq_dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6, "cross_attn_norm": True}


def comfy_config(config: Mapping) -> dict:
    """The WanModel arguments that ComfyUI would guess wrong from the shapes of a model with this diffusers
    config; in most cases {}.
    """
    full = {name: p.default for name, p in _arguments().items()} | dict(config)
    heads, head_dim = full["num_attention_heads"], full["attention_head_dim"]
    values, out_channels = {name: full[name] for name in ASSUMED}, full["out_channels"] or full["in_channels"]
    return unguessed(heads, head_dim, values, out_channels)


def unguessed(heads: int, head_dim: int, values: Mapping, out_channels: int) -> dict:
    """As `comfy_config`, from the number and width of heads, `values` with the names of ASSUMED, and the
    number of output channels.
    """
    out: dict[str, Any] = {"num_heads": heads} if head_dim != HEAD_DIM else {}
    for name, assumed in ASSUMED.items():
        value = list(values[name]) if name == "patch_size" else values[name]
        if value != assumed:
            out[name] = value
    if "patch_size" in out:
        out["out_dim"] = out_channels
    return out


def transformer_config_from(
    shapes: Mapping[str, tuple], metadata: Mapping[str, str], path: str | Path = "the file"
) -> dict:
    """WanTransformer3DModel's arguments, from the shapes of a file in either layout (with or without a
    prefix) and its string metadata.

    The shapes tell everything but the number of heads and eps. Those come from `config`, or else are what
    ComfyUI guesses: 128 channels per head, 1e-6.
    Raises AptError when a defining key is missing or misshapen, or when the number of heads is unknown.
    """
    layout, prefix = layout_of(path, shapes)

    def name_in_file(official: str) -> str:
        return prefix + official if layout == "official" else keys.transformer_to_diffusers(official)

    def optional(official: str, rank: int) -> tuple[int, ...] | None:
        return shape(official, rank) if name_in_file(official) in shapes else None

    def shape(official: str, rank: int) -> tuple[int, ...]:
        key = name_in_file(official)
        if key not in shapes:
            raise AptError(
                f"{path}: {key} missing: the file is not a whole Wan transformer, "
                "export or download it again."
            )
        if len(shapes[key]) != rank or min(shapes[key]) < 1:
            raise AptError(
                f"{path}: {key} has shape {tuple(shapes[key])}, not that of a Wan transformer: "
                "export or download it again."
            )
        return tuple(shapes[key])

    given = metadata_json(path, metadata, "config").get("transformer", {})
    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    heads = (
        given.get("num_heads", dim // HEAD_DIM if dim % HEAD_DIM == 0 else None)
        if isinstance(given, dict)
        else None
    )
    if not isinstance(heads, int) or heads < 1 or dim % heads or dim // heads % 2:
        raise AptError(
            f"{path}: the number of heads cannot be told from {dim} channels: "
            "name a fitting num_heads in its metadata entry `config`."
        )
    eps = given.get("eps", ASSUMED["eps"])
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise AptError(
            f"{path}: its metadata entry `config` has eps {eps!r}: it must be a small positive number."
        )
    image, position = (
        optional("img_emb.proj.0.weight", 1),
        optional("img_emb.emb_pos", 3),
    )
    added = optional("blocks.0.cross_attn.k_img.weight", 2)
    blocks = Counter(
        key.removeprefix(prefix).split(".")[1]
        for key in shapes
        if key.removeprefix(prefix).startswith("blocks.")
    )
    if len(blocks) * blocks["0"] > 2 * len(shapes):
        raise AptError(
            f"{path} names {len(blocks)} blocks, but only the first ones have tensors: "
            "export or download it again."
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shape("head.head.bias", 1)[0] // math.prod(patch),
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": len(blocks),
        "cross_attn_norm": optional("blocks.0.norm3.weight", 1) is not None,
        "eps": eps,
        "image_dim": image and image[0],
        "added_kv_proj_dim": added and added[1],
        "pos_embed_seq_len": position and position[1],
    }


def _arguments() -> Mapping[str, inspect.Parameter]:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return {
        name: p
        for name, p in inspect.signature(WanTransformer3DModel.__init__).parameters.items()
        if name != "self"
    }


def known_arguments(config: Mapping) -> dict:
    """The entries of a config that are arguments of WanTransformer3DModel."""
    return {name: config[name] for name in _arguments() if name in config}


def layout_of(path: str | Path, state: Mapping) -> tuple[str, str]:
    """`keys.detect_layout` of a file's keys; its AptError names the file."""
    try:
        return keys.detect_layout(state)
    except AptError as error:
        raise AptError(f"{path}: {error}") from None
