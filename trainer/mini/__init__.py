"""The miniature: a complete Wan in small, on clips that this project draws, captions and judges itself."""

from pathlib import Path

import apt_core

ASSETS = Path(apt_core.__file__).parent / "assets" / "mini"
"""The shipped weights: transformer, VAE, text encoder with its tokenizer, and the judge's features."""
