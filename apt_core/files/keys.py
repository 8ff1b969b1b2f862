"""The names of the same weights in the official Wan files (which ComfyUI reads) and in diffusers. The
functions only rename, in both directions, without loss.

The official layouts come from reading ComfyUI's comfy/ldm/wan/{model,vae,vae2_2}.py and diffusers' modules.
"""

import re
from collections.abc import Iterable
from functools import cache

from ..errors import AptError

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
"""Prefixes that other programs put before an official transformer key. Removed on reading, never written."""

# official: diffusers
TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the norm before cross-attention; the other two norms have no weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"self_attn.{o}": f"attn1.{d}"
        for o, d in zip(("q", "k", "v", "o"), ("to_q", "to_k", "to_v", "to_out.0"))
    },
    **{
        f"cross_attn.{o}": f"attn2.{d}"
        for o, d in zip(("q", "k", "v", "o"), ("to_q", "to_k", "to_v", "to_out.0"))
    },
    **{
        f"{o}.norm_{x}": f"{d}.norm_{x}"
        for o, d in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qk"
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
TOP_BACK = {d: o for o, d in TOP.items()}
BLOCK_BACK = {d: o for o, d in BLOCK.items()}
KEY = re.compile(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?")


def transformer_to_diffusers(key: str) -> str:
    """`blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q.weight`. Raises AptError for a name that Wan does
    not have.
    """
    return _transformer(key, TOP, BLOCK)


def transformer_to_official(key: str) -> str:
    """`blocks.0.attn1.to_q.weight` -> `blocks.0.self_attn.q.weight`. Raises AptError for a name that Wan does
    not have.
    """
    return _transformer(key, TOP_BACK, BLOCK_BACK)


def _transformer(key: str, top: dict[str, str], block: dict[str, str]) -> str:
    match = KEY.fullmatch(key)
    where, module, leaf = match.groups(default="") if match else ("", "", "")
    new = (block if where else top).get(module)
    if new is None:
        raise AptError(
            f"{key} is not a weight of Wan's text-to-video or image-to-video transformer: give such a model."
        )
    return where + new + leaf


def detect_layout(keys: Iterable[str]) -> tuple[str, str]:
    """The layout of a Wan transformer, "official" or "diffusers", and the prefix before every key.

    Raises AptError when the keys belong to a Wan transformer in neither layout, or when only some of them
    have the prefix.
    """
    keys = dict.fromkeys(keys)
    for prefix in ("", *PREFIXES):
        if prefix + "head.modulation" in keys or prefix + "blocks.0.self_attn.q.weight" in keys:
            if stray := [key for key in keys if not key.startswith(prefix)]:
                raise AptError(
                    f"{stray[0]} lacks the prefix {prefix} of the other keys: "
                    "give a file with the transformer alone."
                )
            return "official", prefix
    if "blocks.0.attn1.to_q.weight" in keys or "condition_embedder.time_proj.weight" in keys:
        return "diffusers", ""
    if any(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in keys):
        raise AptError("it is a LoRA, not a whole Wan transformer: give the model that the LoRA belongs to.")
    raise AptError(
        f"it is not a Wan transformer ({next(iter(keys), 'no key')} is its first key, "
        "and head.modulation is not there): give a Wan model's file."
    )


# The VAE. Both versions have 4 stages, 2 residual blocks a stage down and 3 up; 2.2 nests the blocks of a
# stage, 2.1 counts them through.
RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
STAGES, DOWN_BLOCKS, UP_BLOCKS = 4, 2, 3


@cache
def vae_modules(version: str) -> dict[str, str]:
    """Official to diffusers' names of all modules with weights. version: "2.1" or "2.2"."""
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}

    def add(official: str, diffusers: str, inner: dict[str, str]) -> None:
        names.update({f"{official}.{o}": f"{diffusers}.{d}" for o, d in inner.items()})

    for half in ("encoder", "decoder"):
        add(half, half, {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"})
        add(f"{half}.middle.0", f"{half}.mid_block.resnets.0", RESIDUAL)
        add(f"{half}.middle.1", f"{half}.mid_block.attentions.0", ATTENTION)
        add(f"{half}.middle.2", f"{half}.mid_block.resnets.1", RESIDUAL)
    for stage in range(STAGES):
        for i in range(DOWN_BLOCKS + 1):
            flat = (DOWN_BLOCKS + 1) * stage + i
            block = f"encoder.down_blocks.{stage}"
            resample = i == DOWN_BLOCKS
            if version == "2.1":
                official, diffusers = f"encoder.downsamples.{flat}", f"encoder.down_blocks.{flat}"
            else:
                official, diffusers = (
                    f"encoder.downsamples.{stage}.downsamples.{i}",
                    f"{block}.{'downsampler' if resample else f'resnets.{i}'}",
                )
            add(official, diffusers, RESAMPLE if resample else RESIDUAL)
        for i in range(UP_BLOCKS + 1):
            flat = (UP_BLOCKS + 1) * stage + i
            block = f"decoder.up_blocks.{stage}"
            resample = i == UP_BLOCKS
            if version == "2.1":
                official, diffusers = (
                    f"decoder.upsamples.{flat}",
                    f"{block}.{'upsamplers.0' if resample else f'resnets.{i}'}",
                )
            else:
                official, diffusers = (
                    f"decoder.upsamples.{stage}.upsamples.{i}",
                    f"{block}.{'upsampler' if resample else f'resnets.{i}'}",
                )
            add(official, diffusers, RESAMPLE if resample else RESIDUAL)
    return names


@cache
def _vae_modules_back(version: str) -> dict[str, str]:
    return {d: o for o, d in vae_modules(version).items()}


def vae_to_diffusers(key: str, version: str) -> str:
    """`decoder.head.0.gamma` -> `decoder.norm_out.gamma`. Raises AptError for a name that Wan's VAE `version`
    does not have.
    """
    return _vae(key, vae_modules(version), version)


def vae_to_official(key: str, version: str) -> str:
    """`decoder.norm_out.gamma` -> `decoder.head.0.gamma`. Raises AptError for a name that Wan's VAE `version`
    does not have.
    """
    return _vae(key, _vae_modules_back(version), version)


def _vae(key: str, names: dict[str, str], version: str) -> str:
    module, _, leaf = key.rpartition(".")
    if module not in names:
        raise AptError(f"{key} is not a weight of Wan's VAE {version}: give a file with that VAE alone.")
    return f"{names[module]}.{leaf}"


VAE_PREFIXES = ("model.", "vae.", "first_stage_model.")
"""Prefixes that other programs put before all keys of a VAE. Removed on reading, never written."""


def vae_prefix(keys: Iterable[str]) -> str:
    """The prefix that every key of a VAE's file has; "" when there is none."""
    keys = list(keys)
    return next(
        (prefix for prefix in VAE_PREFIXES if keys and all(key.startswith(prefix) for key in keys)), ""
    )


def detect_vae_layout(keys: Iterable[str]) -> tuple[str, str]:
    """The layout, "official" or "diffusers", and the version, "2.1" or "2.2", of a Wan VAE with or without a
    prefix. Raises AptError when it is not a Wan VAE.
    """
    prefix = vae_prefix(keys := list(keys))
    keys = {key.removeprefix(prefix) for key in keys}
    if "decoder.middle.0.residual.0.gamma" in keys:
        return "official", "2.2" if "decoder.upsamples.0.upsamples.0.residual.2.weight" in keys else "2.1"
    if "decoder.mid_block.resnets.0.norm1.gamma" in keys:
        return "diffusers", "2.2" if "encoder.down_blocks.0.resnets.0.conv1.weight" in keys else "2.1"
    raise AptError(
        "it is not a Wan VAE (decoder.middle.0.residual.0.gamma is not there): "
        "give the file of a Wan 2.1 or 2.2 VAE."
    )
