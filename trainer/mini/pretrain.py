"""Rebuild the miniature's shipped files, part by part."""

from pathlib import Path

from apt_core.engine.fast import check_device
from apt_core.errors import AptError
from apt_core.files.atomic import make_folder
from trainer.run.progress import console, say

from . import ASSETS

PARTS = ("vae", "sharpen", "text", "features", "teacher", "base")
FILES = {
    "vae": "steps/smooth_vae.safetensors",
    "sharpen": "vae/apt_mini_vae.safetensors",
    "text": "text_encoder.safetensors",
    "features": "features.safetensors",
    "teacher": "steps/teacher.safetensors",
    "base": "transformer.safetensors",
}
"""The file that each part writes. `sharpen` continues with the VAE of `vae`, and `base` learns from
`teacher`; the files of `vae` and `teacher` are not shipped.
"""
SHIPPED = tuple(FILES[name] for name in ("sharpen", "text", "features", "base"))


def pretrain(part: str, out: Path, *, seed: int, device: str, amp: bool, compiled: bool) -> None:
    """Train `part` ("all" or one of PARTS) and write it into `out`.

    If a part needs another one, it takes that from `out`, or the shipped file if `out` has none.
    Raises AptError for an unknown part, a device that torch cannot use, and an `out` that cannot be written.
    """
    if part not in (*PARTS, "all"):
        raise AptError(f"there is no part {part!r} to train; use all, {', '.join(PARTS)}.")
    check_device(device)
    make_folder(out)
    for name in PARTS if part == "all" else (part,):
        target = out / FILES[name]
        if target.exists():
            say(f"{target} is there already; delete it to train it again")
            continue
        make_folder(target.parent)
        _train(name, target, out, seed=seed, device=device, amp=amp, compiled=compiled)
        say(f"wrote {target}")


def _file(name: str, out: Path) -> Path:
    return out / FILES[name] if (out / FILES[name]).exists() else ASSETS / FILES[name]


def _train(name: str, target: Path, out: Path, *, seed: int, device: str, amp: bool, compiled: bool) -> None:
    report = console.print
    vae, text, teacher = _file("sharpen", out), _file("text", out), out / FILES["teacher"]
    if name == "vae":
        from .train_vae import train_vae

        train_vae(target, seed=seed, device=device, amp=amp, report=report)
    elif name == "sharpen":
        from .train_vae import sharpen

        smooth = out / FILES["vae"]
        sharpen(
            smooth if smooth.exists() else ASSETS / FILES["sharpen"],
            target,
            seed=seed,
            device=device,
            report=report,
        )
    elif name == "text":
        from .train_text import train_text_encoder

        train_text_encoder(target, seed=seed, report=report)
    elif name == "features":
        from .features import train_features

        train_features(target, seed=seed, report=report)
    else:
        from .train_base import GROWN, train_base

        recipe = (
            {"stages": GROWN, "weight_decay": 0.0}
            if name == "teacher"
            else {"teacher": teacher if teacher.exists() else None}
        )
        train_base(
            target,
            vae,
            text,
            work=target.parent / name,
            seed=seed,
            device=device,
            amp=amp,
            compiled=compiled,
            report=report,
            **recipe,
        )
