"""Networks small enough for any test, and the shapes that several tests share."""

import torch

from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.wan import WanBackbone

EITHER = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10)
WAN = EITHER | dict(freq_dim=16, ffn_dim=32, rope_max_seq_len=32)
MMDIT = EITHER | dict(axes_dims_rope=(4, 4, 4))
WAN_16 = dict(num_attention_heads=2, attention_head_dim=24, text_dim=20, freq_dim=32, ffn_dim=80)
"""Of 16 channels, which is what ComfyUI takes a Wan 2.1 by."""


def tiny_wan(cls=WanBackbone, layers: int = 3, seed: int = 0, **changes):
    """A Wan of class `cls` for latents of 4 channels and texts of width 10. changes: of its configuration."""
    torch.manual_seed(seed)
    return cls(**WAN | {"num_layers": layers} | changes)


def tiny_mmdit(layers: int = 4, seed: int = 0, **changes) -> MMDiTBackbone:
    """An MMDiT for latents of 4 channels and texts of width 10. changes: of its configuration."""
    torch.manual_seed(seed)
    return MMDiTBackbone(**MMDIT | {"num_layers": layers} | changes)


def tiny_wan_16(layers: int = 3, seed: int = 0, **changes) -> WanBackbone:
    """A Wan for latents of 16 channels and texts of width 20. changes: of its configuration."""
    torch.manual_seed(seed)
    return WanBackbone(**WAN_16 | {"num_layers": layers} | changes)
