"""Few-step Wan models of other projects, as far as the names and shapes of their weights tell.

    net.patch_embedding.weight [1536, 64]                  rCM: a prefix, and a linear layer for a convolution
    patch_embedding.weight [1536, 64]                      TurboDiffusion
    blocks.0.self_attn.attn_op.local_attn.proj_l.weight    TurboDiffusion, sparse-linear attention
    blocks.0.to_gate_compress.weight                       FastWan, video sparse attention
    blocks.0.diff_m                                        LightX2V, of a LoRA: a difference of the modulation

Self-Forcing's names (`model.`) and most LoRAs' are everybody's. None of them says which times it was trained for.
"""

import math
import re
from collections.abc import Iterable, Mapping

PATCH = "patch_embedding.weight"
PATCH_SIZE = (1, 2, 2)
"""Of every Wan; a linear patch embedding does not tell it."""
RCM_PREFIX = "net."
SPARSE = (
    (
        r"\.(?:attn_op\.local_attn|attn_impl|self_attn)\.proj_l\.",
        "TurboDiffusion's sparse-linear attention (SLA)",
    ),
    (r"\.to_gate_compress\.", "FastWan's video sparse attention (VSA)"),
)
"""Weights of attentions that full attention has no place for."""


def sparse_attention(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a key, whose attention) of a model that was trained with another attention than Wan's own."""
    keys = list(keys)
    return next(((key, what) for pattern, what in SPARSE for key in keys if re.search(pattern, key)), None)


def convolution_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes, with that of a linear patch embedding `[dim, c * 4]` as the convolution's `[dim, c, 1, 2,
    2]` that it is: the same numbers in the same order. Only where as many channels come out of the head, as
    in every text-to-video model: else it is damage.
    """
    out = dict(shapes)
    for key, shape in shapes.items():
        if key.endswith(PATCH) and len(shape) == 2:
            head = shapes.get(key.removesuffix(PATCH) + "head.head.bias", ())
            if tuple(head) == tuple(shape[1:]) and shape[1] % math.prod(PATCH_SIZE) == 0:
                out[key] = (shape[0], shape[1] // math.prod(PATCH_SIZE), *PATCH_SIZE)
    return out


def origin(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whose few-step model or LoRA this is, in words; None where the names do not tell."""
    if found := sparse_attention(shapes):
        return found[1].partition("'s ")[0]
    linear = any(key.endswith(PATCH) and len(shape) == 2 for key, shape in shapes.items())
    if linear:
        return "rCM" if any(key.startswith(RCM_PREFIX) for key in shapes) else "TurboDiffusion or rCM"
    if any(key.rpartition(".")[2] == "diff_m" for key in shapes):
        return "LightX2V"
    return None
