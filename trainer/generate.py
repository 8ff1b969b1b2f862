"""`generate`: prompts to videos or pictures, from any checkpoint of this project or a base model, on one process or many."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apt_core.errors import AptError
from apt_core.flow import sample_noise
from apt_core.generator import euler_cfg, few_step
from apt_core.vae import check_size, decode, stride
from trainer.base import open_text_encoder, open_vae
from trainer.config import Files
from trainer.distributed import World
from trainer.files import make_folder
from trainer.media import write_image, write_video
from trainer.progress import stage_bar
from trainer.weights import cast, open_generator

SECOND_TIME = 0.7


@dataclass(frozen=True)
class Wish:
    """What to make. height, width, frames, fps: by default what the checkpoint was trained for; one frame is a picture.
    count: samples of each prompt; steps: 1, or 2 (zero-shot), more are Euler steps for base models, with guidance, negative and shift."""

    prompts: Sequence[str]
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    count: int = 1
    seed: int = 0
    steps: int = 1
    guidance: float = 1.0
    shift: float = 5.0
    negative: str = ""


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises AptError for a file that is not there, not text or empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise AptError(f"{path} cannot be read as UTF-8 text: give a file with one prompt a line.") from None
    if not any(lines):
        raise AptError(f"{path} holds no prompt: write one a line.")
    return [line for line in lines if line]


@torch.no_grad()
def generate(checkpoint: Path, wish: Wish, out: Path, files: Files, world: World = World(), ema: float | None = None) -> list[Path]:
    """Write one file a sample into `out`, `NNNN-words-of-the-prompt.mp4` (or .png), and return this process's.

    files: the VAE and the text encoder, and the base of a LoRA. Sample number n is the same for any number of processes; each takes every
    world-th one. Raises AptError for files that do not fit the checkpoint, and for sizes that the model cannot make.
    """
    if not wish.prompts:
        raise AptError("there is no prompt: give one, or --prompts FILE with one a line.")
    if min(wish.count, wish.steps) < 1:
        raise AptError(f"{wish.count} samples in {wish.steps} steps cannot be made: both must be 1 or more.")
    generator = open_generator(checkpoint, files.base or None, ema)
    config, native = generator.model.config, {"height": 480, "width": 832, "frames": 49, "fps": 16} | generator.metadata.get("native", {})
    height, width, frames = (getattr(wish, name) or native[name] for name in ("height", "width", "frames"))
    vae = open_vae(files)
    if vae.config.z_dim != config.in_channels:
        raise AptError(f"vae {files.vae} has {vae.config.z_dim} channels, but {checkpoint} makes latents of {config.in_channels}: give that model's VAE.")
    check_size(height, width, frames, stride(vae), what="a sample")
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    text = _embed(files, generator.metadata.get("text_length", 512), config.text_dim, [*wish.prompts, wish.negative], world.device)

    model = cast(generator.model, world.device, dtype).eval()
    if generator.base is not None:
        cast(generator.base, world.device, dtype)
    cast(vae, world.device, dtype)
    t, down, across = stride(vae)
    shape = (config.in_channels, (frames - 1) // t + 1, height // down, width // across)
    mine = range(world.rank, len(wish.prompts) * wish.count, world.size)
    make_folder(out)
    written = []
    with stage_bar("Sampling") as report:
        for done, number in enumerate(mine):
            prompt = number // wish.count
            latents = _sample(model, wish, shape, number, text[prompt][None].to(world.device), text[-1][None].to(world.device))
            pixels = ((decode(vae, latents)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
            stem = out / f"{number:04d}-{_words(wish.prompts[prompt])}"
            written.append(stem.with_name(f"{stem.name}.png" if frames == 1 else f"{stem.name}.mp4"))
            if frames == 1:
                write_image(written[-1], pixels[0])
            else:
                write_video(written[-1], pixels, wish.fps or native["fps"])
            report(done + 1, len(mine))
    return written


def _sample(model, wish: Wish, shape: tuple[int, ...], number: int, text: Tensor, negative: Tensor) -> Tensor:
    def noise(stream: str) -> Tensor:
        return sample_noise([number], shape, wish.seed, f"generate/{stream}").to(text.device)

    if wish.steps <= 2:
        return few_step(model, noise("z"), text, (1.0, SECOND_TIME)[: wish.steps], lambda i: noise(f"step{i}"))
    return euler_cfg(model, noise("z"), text, negative, wish.steps, wish.guidance, wish.shift)


def _embed(files: Files, length: int, width: int, prompts: list[str], device: torch.device) -> Tensor:
    """`[n, length, width]`; the encoder is let go again before anything else takes its memory."""
    encoder = open_text_encoder(files, length).to(device)
    if encoder.dim != width:
        raise AptError(f"text_encoder {files.text_encoder} has width {encoder.dim}, but the checkpoint wants {width}: give that model's text encoder.")
    return encoder.pad(encoder.encode(prompts), length).cpu()


def _words(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt).strip("-")[:40].strip("-") or "sample"
