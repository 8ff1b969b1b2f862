"""Recognise few-step Wan models of other projects by the names and shapes of their weights.

    net.patch_embedding.weight [1536, 64]                  rCM: a prefix, and a linear layer for a convolution
    patch_embedding.weight [1536, 64]                      TurboDiffusion
    blocks.0.self_attn.attn_op.local_attn.proj_l.weight    TurboDiffusion, sparse-linear attention
    blocks.0.to_gate_compress.weight                       FastWan, video sparse attention
    blocks.0.diff_m                                        LightX2V, of a LoRA: a difference of the modulation

Self-Forcing's names (`model.`) and the names in most LoRAs are used by many projects. No file says for which
times its model was trained.
"""

import math
import re
from collections.abc import Iterable, Mapping

PATCH = "patch_embedding.weight"
PATCH_SIZE = (1, 2, 2)
"""The patch size of every Wan; the shape of a linear patch embedding does not show it."""
RCM_PREFIX = "net."
SPARSE = (
    (
        r"\.(?:attn_op\.local_attn|attn_impl|self_attn)\.proj_l\.",
        "TurboDiffusion's sparse-linear attention (SLA)",
    ),
    (r"\.to_gate_compress\.", "FastWan's video sparse attention (VSA)"),
)
"""Weights of other kinds of attention, which full attention cannot use."""


def sparse_attention(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a key, the kind of attention) for a model that was trained with another attention than Wan's own."""
    keys = list(keys)
    return next(((key, what) for pattern, what in SPARSE for key in keys if re.search(pattern, key)), None)


def convolution_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes, with a linear patch embedding `[dim, c * 4]` written as the equal convolution `[dim, c, 1,
    2, 2]`: the same numbers in the same order. This is done only when the head returns as many channels, as
    in every text-to-video model; any other shape is damage.
    """
    out = dict(shapes)
    for key, shape in shapes.items():
        if key.endswith(PATCH) and len(shape) == 2:
            head = shapes.get(key.removesuffix(PATCH) + "head.head.bias", ())
            if tuple(head) == tuple(shape[1:]) and shape[1] % math.prod(PATCH_SIZE) == 0:
                out[key] = (shape[0], shape[1] // math.prod(PATCH_SIZE), *PATCH_SIZE)
    return out


def origin(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The project that made a few-step model or LoRA, in words; None when the names do not tell."""
    if found := sparse_attention(shapes):
        return found[1].partition("'s ")[0]
    linear = any(key.endswith(PATCH) and len(shape) == 2 for key, shape in shapes.items())
    if linear:
        return "rCM" if any(key.startswith(RCM_PREFIX) for key in shapes) else "TurboDiffusion or rCM"
    if any(key.rpartition(".")[2] == "diff_m" for key in shapes):
        return "LightX2V"
    return None
