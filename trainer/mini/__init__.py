"""The miniature: a small but complete Wan, on clips that this project draws, captions and judges itself."""

from pathlib import Path

import apt_core

ASSETS = Path(apt_core.__file__).parent / "assets" / "mini"
"""Folder of the shipped weights.

It holds the base transformer, the VAE, the text encoder with its tokenizer, the network whose features the
metrics use, and the generator of one demo. `vae` and `diffusion_models` are separate folders because ComfyUI
lists whole folders: the nodes register these two with it.
"""
VAE = ASSETS / "vae" / "apt_mini_vae.safetensors"
GENERATOR = ASSETS / "diffusion_models" / "apt_mini.safetensors"
