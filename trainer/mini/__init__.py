"""The miniature: a complete Wan in small, on clips that this project draws, captions and judges itself."""

from pathlib import Path

import apt_core

ASSETS = Path(apt_core.__file__).parent / "assets" / "mini"
"""The shipped weights: base transformer, VAE, text encoder with its tokenizer, the judge's features, and one
demo's generator.

`vae` and `diffusion_models` are folders of their own because ComfyUI lists whole folders: the nodes hand it
these two.
"""
VAE = ASSETS / "vae" / "apt_mini_vae.safetensors"
GENERATOR = ASSETS / "diffusion_models" / "apt_mini.safetensors"
