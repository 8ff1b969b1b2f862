"""Adversarial Post-Training (APT, arXiv 2501.08316): the method as a plain torch library.

What people need most, by short names: `from apt_core import OneStepPipeline, Discriminator, Objective`. All
else is in the rooms of docs/architecture.md. A name's module is imported when it is asked for, since torch
and diffusers take seconds.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.pipeline import OneStepPipeline, Video
    from .errors import AptError, NotFinite, OutOfMemory
    from .loading.backbones import load_backbone
    from .loading.checkpoint import load_transformer, save_generator
    from .method.consistency import ConsistencySettings, consistency_backward
    from .method.discriminator import Discriminator
    from .method.dmd import DmdSettings, dmd_backward, fake_backward
    from .method.ema import Ema
    from .method.flow import interpolate, shift
    from .method.generator import euler_cfg, few_step, one_step
    from .method.objectives import Objective, discriminator_backward, generator_backward
    from .method.steps import step_times
    from .models.lora import add_adapters, load_lora, role, save_lora
    from .models.mmdit import MMDiTBackbone
    from .models.vae import load_vae
    from .models.wan import WanBackbone, predict_velocity

_MODULES = {
    ".engine.pipeline": ("OneStepPipeline", "Video"),
    ".errors": ("AptError", "NotFinite", "OutOfMemory"),
    ".loading.checkpoint": ("load_transformer", "save_generator"),
    ".loading.backbones": ("load_backbone",),
    ".method.consistency": ("ConsistencySettings", "consistency_backward"),
    ".method.discriminator": ("Discriminator",),
    ".method.dmd": ("DmdSettings", "dmd_backward", "fake_backward"),
    ".method.ema": ("Ema",),
    ".method.flow": ("interpolate", "shift"),
    ".method.generator": ("euler_cfg", "few_step", "one_step"),
    ".method.objectives": ("Objective", "discriminator_backward", "generator_backward"),
    ".method.steps": ("step_times",),
    ".models.lora": ("add_adapters", "load_lora", "role", "save_lora"),
    ".models.mmdit": ("MMDiTBackbone",),
    ".models.vae": ("load_vae",),
    ".models.wan": ("WanBackbone", "predict_velocity"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AptError",
    "ConsistencySettings",
    "Discriminator",
    "DmdSettings",
    "Ema",
    "MMDiTBackbone",
    "NotFinite",
    "Objective",
    "OneStepPipeline",
    "OutOfMemory",
    "Video",
    "WanBackbone",
    "add_adapters",
    "consistency_backward",
    "discriminator_backward",
    "dmd_backward",
    "euler_cfg",
    "fake_backward",
    "few_step",
    "generator_backward",
    "interpolate",
    "load_backbone",
    "load_lora",
    "load_transformer",
    "load_vae",
    "one_step",
    "predict_velocity",
    "role",
    "save_generator",
    "save_lora",
    "shift",
    "step_times",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name == "__version__":
        try:
            return version("comfyui-apt")
        except PackageNotFoundError:  # a folder of ComfyUI's, never installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
