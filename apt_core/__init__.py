"""Adversarial Post-Training (APT, arXiv 2501.08316): the method as a plain torch library."""

from importlib import import_module

LAZY = {"OneStepPipeline": ".pipeline", "Video": ".pipeline"}
"""Names whose modules take seconds to import, and are imported when they are asked for."""


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
