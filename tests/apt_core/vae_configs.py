"""Settings of Wan's VAEs, as diffusers' AutoencoderKLWan takes them."""

WAN_22 = {
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48,
    "latents_std": [1.1] * 48,
}
"""What Wan 2.2's has at any width; the widths follow."""
RELEASED_22 = WAN_22 | {"base_dim": 160, "decoder_base_dim": 256}
SMALL_22 = WAN_22 | {"base_dim": 4, "decoder_base_dim": 8}
