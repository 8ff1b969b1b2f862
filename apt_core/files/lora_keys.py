"""Tell from the names in a LoRA file which program wrote it, and which weight of Wan each name belongs to.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight   ComfyUI, this project, most trainers
    lora_unet_blocks_0_self_attn_q.lora_down.weight      kohya's musubi-tuner; others: lora_unet__, lycoris_
    base_model.model.blocks.0.self_attn.q.lora_A.weight  PEFT
    transformer.blocks.0.attn1.to_q.lora_A.weight        diffusers

A layer is looked up in the tables of `keys`, never guessed from its underscores.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from .keys import BLOCK, BLOCK_BACK, TOP, TOP_BACK

FORMS = {
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "kohya",
    "lycoris_": "LyCORIS",
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "model.": "ComfyUI",
    "pipe.dit.": "DiffSynth",
    "": "no prefix",
}
"""The program that writes a prefix; longer prefixes first."""
UNDERSCORED = ("lora_unet__", "lora_unet_", "lycoris_")
BARE = ("modulation", "head.modulation", "img_emb.emb_pos")
"""Weights that are not part of a layer; their names do not end with `.weight`."""

DOWN, UP = ("lora_down", "lora_A", "lora.down"), ("lora_up", "lora_B", "lora.up")
SIDES = {**dict.fromkeys(DOWN, "down"), **dict.fromkeys(UP, "up")}
PLAIN = {
    "alpha": "alpha",
    **dict.fromkeys(("diff", "w_norm", "diff_m"), "diff"),
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
}
PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<side>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>\w+))?(?:\.(?P<leaf>weight|bias))?"
    r"|(?P<plain>alpha|diff|w_norm|diff_m|diff_b|b_norm))"
)
MARK = re.compile(
    r"(?:^|[._])(?:lora_|lora\.(?:down|up)|lokr_|hada_|b?oft_|dora_scale|vera_lambda|ia3_l)"
    r"|\.(?:diff|diff_b|diff_m|w_norm|b_norm)$"
)

KINDS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which also scales the sum of weight and LoRA"),
    (r"lokr_", "a LoKr (Kronecker products)"),
    (r"hada_", "a LoHa (Hadamard products)"),
    (r"[._]boft_", "a BOFT (it multiplies the weights)"),
    (r"[._]oft_", "an OFT (it multiplies the weights)"),
    (r"lora_mid", "a LoRA with a Tucker core, for convolutions"),
    (r"vera_lambda", "a VeRA (its factors are not in the file)"),
    (r"ia3_l|\.on_input$", "an IA3 (it multiplies the weights)"),
    (r"lora_E\b|\branknum\b", "an AdaLoRA (singular values between its factors)"),
    (r"lora_embedding_", "a LoRA of an embedding table"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"scale_weight$|weight_scale$|scale_input$|scaled_fp8$|comfy_quant$", "a LoRA in scaled fp8"),
    (r"\.set_weight$|\.reshape_weight$", "a LoRA that replaces or widens whole weights"),
)
"""Forms that cannot be read as a sum, by the names that give them away."""

MODELS = (
    (
        r"^lora_te\d*_|^lora_prior_te|^text_encoder\w*\.|^te\d?\.|^cond_stage_model|^conditioner\.",
        "a text encoder",
    ),
    (r"^transformer_2\.", "the second expert of Wan 2.2 A14B, in one file with the first"),
    (r"(?:^|[._])vace_(?:blocks|patch)", "Wan VACE"),
    (
        r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]",
        "Stable Diffusion or SDXL",
    ),
    (
        r"double_blocks\.\d+\.(?:img|txt)_attn_|_blocks[._]\d+[._](?:img|txt)_(?:mlp[._]fc|mod[._]linear)"
        r"|modulation[._]linear|token_refiner",
        "HunyuanVideo",
    ),
    (
        r"double_blocks[._]\d+[._](?:img|txt)_(?:attn\.|mlp[._][02]|mod[._]lin)"
        r"|single_blocks[._]\d+[._]modulation[._]lin\b",
        "Flux",
    ),
    (r"(?:double_blocks|single_blocks|single_transformer_blocks)[._]", "Flux or HunyuanVideo"),
    (r"(?:^|[._])joint_blocks[._]", "Stable Diffusion 3"),
    (r"(?:^|[._])transformer_blocks[._]\d", "another transformer (LTX-Video, Qwen-Image, CogVideoX, ...)"),
    (r"(?:^|[._])layers[._]\d+[._]", "another transformer (Z-Image, Lumina, a language model, ...)"),
)
"""Other models than a Wan transformer, by the names of their weights."""


class Place(NamedTuple):
    """form: the program whose names these are; layer: its official name; part: down, up, up_bias, alpha, diff
    or diff_b; name: the layer's name in the file, without the prefix.
    """

    form: str
    layer: str
    part: str
    name: str


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the names of a LoRA file, or of a related form, and not of a whole model."""
    return any(MARK.search(key) for key in keys)


def find_place(key: str, own: Sequence[str] = ()) -> Place | None:
    """What a key of a LoRA file stands for; None when it is unknown. own: names of the base's weights when
    the base is not a Wan.
    """
    prefix = next(prefix for prefix in FORMS if key.startswith(prefix))
    form, rest = FORMS[prefix], key[len(prefix) :]
    whole = rest
    if form == "PEFT":  # over a model that itself has a prefix
        rest = rest.removeprefix("model.").removeprefix("diffusion_model.").removeprefix("transformer.")
    if not (match := PART.fullmatch(rest)):
        return None
    name, flat = match["layer"], prefix in UNDERSCORED
    inner = whole[: len(whole) - len(rest)]
    if match["plain"] == "diff_m":  # LightX2V: for the table of the block or the head
        name += "_modulation" if flat else ".modulation"
    layer = _layer(name, flat, tuple(own))
    if layer is None:
        return None
    part = PLAIN.get(match["plain"]) or SIDES[match["side"]] + ("_bias" if match["leaf"] == "bias" else "")
    return None if part == "down_bias" else Place(form, layer, part, inner + name)


def weight_of(layer: str, own: Sequence[str] = ()) -> str:
    """The full name of a layer's weight."""
    bare = layer in own if own else re.sub(r"^blocks\.\d+\.", "", layer) in BARE
    return layer if bare else f"{layer}.weight"


def unreadable_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a key, the kind of file) for a file that is more than a sum, such as a DoRA; None for a LoRA."""
    return _first(keys, KINDS)


def foreign_model(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a key, the model) for names of another model than a Wan transformer; None when no such name is
    known.
    """
    return _first(keys, MODELS)


def _first(keys: Iterable[str], table: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    keys = list(keys)
    found = ((key, what) for pattern, what in table for key in keys if re.search(pattern, key))
    return next(found, None)


def _layer(name: str, flat: bool, own: tuple[str, ...]) -> str | None:
    if own:
        return _own_layers(own).get((flat, name))
    match = re.fullmatch(r"(blocks_\d+_)?(.+)" if flat else r"(blocks\.\d+\.)?(.+)", name)
    if match is None:
        return None
    where, module = match.groups(default="")
    found = wan_layers(bool(where), flat).get(module)
    return found and where.replace("_", ".") + found


@cache
def wan_layers(in_block: bool, flat: bool) -> dict[str, str]:
    """The official name of each of Wan's layers, by its official and its diffusers name, inside or outside of
    a block. flat: with underscores instead of dots.
    """
    names = {
        **(BLOCK_BACK if in_block else TOP_BACK),
        **{name: name for name in (BLOCK if in_block else TOP)},
    }
    return {name.replace(".", "_"): official for name, official in names.items()} if flat else names


@cache
def _own_layers(own: tuple[str, ...]) -> dict[tuple[bool, str], str]:
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in own}
    return {
        (flat, layer.replace(".", "_") if flat else layer): layer
        for layer in layers
        for flat in (False, True)
    }
