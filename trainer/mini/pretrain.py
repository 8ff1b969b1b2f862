"""Rebuilds the miniature's shipped files, one part after the other."""

import shutil
from pathlib import Path

from apt_core.errors import AptError
from trainer.progress import console

from . import ASSETS

PARTS = ("vae", "text", "features", "base")
FILES = {"vae": "vae.safetensors", "text": "text_encoder.safetensors", "features": "features.safetensors", "base": "transformer.safetensors"}


def pretrain(part: str, out: Path, *, seed: int, device: str, amp: bool, compiled: bool) -> None:
    """Train `part` ("all" or one of PARTS) into `out`; a part that needs another takes it from `out`, else the shipped one.

    Raises AptError for an unknown part.
    """
    if part not in (*PARTS, "all"):
        raise AptError(f"there is no part {part!r} to train; use all, {', '.join(PARTS)}.")
    out.mkdir(parents=True, exist_ok=True)
    for name in PARTS if part == "all" else (part,):
        target = out / FILES[name]
        if target.exists():
            console.print(f"{target} is there already; delete it to train it again")
            continue
        _train(name, target, _file("vae", out), _file("text", out), seed=seed, device=device, amp=amp, compiled=compiled)
        console.print(f"wrote {target}")


def _file(name: str, out: Path) -> Path:
    return out / FILES[name] if (out / FILES[name]).exists() else ASSETS / FILES[name]


def _train(name: str, target: Path, vae: Path, text: Path, *, seed: int, device: str, amp: bool, compiled: bool) -> None:
    report = console.print
    if name == "vae":
        from .train_vae import train_vae

        train_vae(target, seed=seed, device=device, amp=amp, report=report)
    elif name == "text":
        from .train_text import train_text_encoder

        train_text_encoder(target, seed=seed, report=report)
    elif name == "features":
        from .features import train_features

        train_features(target, seed=seed, report=report)
    else:
        from .train_base import train_base

        train_base(target, vae, text, work=target.parent / "base", seed=seed, device=device, compiled=compiled, report=report)


def install(out: Path) -> None:
    """Copy rebuilt files over the shipped ones."""
    for name in FILES.values():
        if (out / name).exists():
            shutil.copyfile(out / name, ASSETS / name)
