"""The names of a UMT5 encoder's weights: those of transformers, which ComfyUI also uses, and Wan's own, as in
models_t5_umt5-xxl-enc and the files that Kijai made of it. The functions only rename.

Wan's names come from reading its wan/modules/t5.py: gate and fc1 are what transformers calls wi_0 and wi_1.
"""

import re
from collections.abc import Iterable, Mapping

from ..errors import AptError

TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
BLOCK = {
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "norm2": "layer.1.layer_norm",
}
KEY = re.compile(r"blocks\.(\d+)\.(.+)\.(\w+)")
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def has_wan_names(keys: Iterable[str]) -> bool:
    """Whether these are Wan's own names of a UMT5 encoder."""
    return {"token_embedding.weight", "blocks.0.attn.q.weight"} <= set(keys)


def text_to_transformers(keys: Iterable[str]) -> dict[str, str]:
    """Maps each key to transformers' name for it. A key that is not one of Wan's own maps to itself."""
    keys = list(keys)
    return {key: _renamed(key) for key in keys} if has_wan_names(keys) else {key: key for key in keys}


def _renamed(key: str) -> str:
    found = KEY.fullmatch(key)
    if found and found[2] in BLOCK:
        return f"encoder.block.{found[1]}.{BLOCK[found[2]]}.{found[3]}"
    return TOP.get(key, key)


def is_text_encoder(keys: Iterable[str]) -> bool:
    """Whether these are the names of a T5 or a UMT5, in either form."""
    keys = set(keys)
    return has_wan_names(keys) or "encoder.final_layer_norm.weight" in keys


def is_t5(keys: Iterable[str]) -> bool:
    """Whether these are the names of a T5. It has a relative attention bias only in its first block, and a
    UMT5 has one in each block.
    """
    keys = set(keys)
    later = any(key.startswith("encoder.block.1.") for key in keys)
    return BIAS.format(0) in keys and later and BIAS.format(1) not in keys


def refuse_t5(what: object, shapes: Mapping) -> None:
    """Raise AptError for a T5, such as Flux's T5-XXL; `what` begins the sentence."""
    if is_t5(shapes):
        raise AptError(
            f"{what} is a T5 (its relative attention bias is in block 0 only), as Flux and SD3 have it, and "
            "not the UMT5 that Wan reads: give umt5_xxl."
        )
