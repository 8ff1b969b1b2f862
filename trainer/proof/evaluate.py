"""Make the samples for each column of the report.

The columns are real samples (as they are, and through the VAE), the base in 25 steps and in one, the
distilled model, and APT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.engine.fast import Speed, make_fast
from apt_core.files.checkpoint_header import read_metadata
from apt_core.files.contract import second_time
from apt_core.loading.checkpoint import load_transformer
from apt_core.method.flow import sample_noise
from apt_core.method.generator import euler_cfg, few_step, one_step
from apt_core.method.steps import step_times
from apt_core.models.vae import decode, encode
from trainer.config import Sampling

COLUMNS = ("real", "real_vae", "base_25_cfg", "base_1", "distilled_1", "apt_1", "apt_2")
"""The demo's columns. real_vae, real samples through the VAE, is the best that any generator could reach."""
ALL_COLUMNS = (*COLUMNS[:2], "base_25_cfg1", "base_25_cfg", "base_25_cfg7.5", *COLUMNS[3:])
"""The columns of `measure`. They add the base without guidance and with the paper's 7.5; `base_25_cfg` uses
the preset's own scale, which is the best for it.
"""
TITLES = {
    "real": "real",
    "real_vae": "real, through the VAE",
    "base_25_cfg1": "base, {steps} steps",
    "base_25_cfg": "base, {steps} steps, CFG {guidance:g}",
    "base_25_cfg7.5": "base, {steps} steps, CFG 7.5",
    "base_1": "base, 1 step",
    "distilled_1": "distilled, 1 step",
    "apt_1": "APT, 1 step",
    "apt_2": "APT, 2 steps",
}


@dataclass(frozen=True)
class Models:
    """The checkpoint files to compare for one kind of sample (images or clips)."""

    base: Path
    distilled: Path
    apt: Path


class Sampler:
    """Makes the latents of every column from the same prompts and the same noise.

    Column apt_N takes N steps; their times follow from the second time stored in the APT file.
    text, negative: padded embeddings `[n, L, d]` and `[1, L, d]`; shape: of one latent, `(C, F, h, w)`.
    fp8: run the blocks of the APT model in 8 bits.
    """

    def __init__(
        self,
        models: Models,
        sampling: Sampling,
        kind: str,
        text: Tensor,
        negative: Tensor,
        shape: tuple,
        seed: int,
        device: str = "cpu",
        batch: int = 128,
        fp8: bool = False,
    ):
        self.sampling, self.kind, self.seed, self.device, self.batch = sampling, kind, seed, device, batch
        self.text, self.negative, self.shape = text, negative.to(device), shape
        self.networks = {
            name: load_transformer(getattr(models, name), device=device).requires_grad_(False)
            for name in ("base", "distilled", "apt")
        }
        self.second_time = second_time(models.apt, read_metadata(models.apt))
        if fp8:
            make_fast(self.networks["apt"], torch.device(device), Speed(fp8=True))

    def latents(self, column: str) -> Tensor:
        """One column's normalised latents `[n, C, F, h, w]`."""
        parts = []
        for first in range(0, len(self.text), self.batch):
            numbers = list(range(first, min(len(self.text), first + self.batch)))
            parts.append(self._batch(column, numbers, self.text[numbers].to(self.device)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _batch(self, column: str, numbers: list[int], text: Tensor) -> Tensor:
        z = sample_noise(numbers, self.shape, self.seed, "sample/z").to(self.device)
        s = self.sampling
        if column.startswith("base_25_cfg"):
            return euler_cfg(
                self.networks["base"],
                z,
                text,
                self.negative,
                s.steps,
                guidance_of(column, s),
                s.shift(self.kind),
            )
        name, _, steps = column.rpartition("_")
        if int(steps) > 1:
            times = step_times(int(steps), self.second_time)
            return few_step(
                self.networks[name],
                z,
                text,
                times,
                lambda i: sample_noise(numbers, self.shape, self.seed, f"sample/z{i}"),
            )
        return one_step(self.networks[name], z, text)


def network_calls(column: str, sampling: Sampling) -> int:
    """How many network calls one sample of a column takes (with guidance, two per step)."""
    if column.startswith("base_25_cfg"):
        return sampling.steps * (1 if guidance_of(column, sampling) == 1 else 2)
    return 0 if column in ("real", "real_vae") else int(column.rpartition("_")[2])


def guidance_of(column: str, sampling: Sampling) -> float:
    """The guidance scale of a base_25_cfg column."""
    return float(column.removeprefix("base_25_cfg") or sampling.guidance)


@torch.no_grad()
def through_vae(vae, pixels: np.ndarray, batch: int = 16) -> np.ndarray:
    """Encode and decode pixels, uint8 `[n, F, H, W, 3]`. No generator in this latent space can do better."""
    device, parts = (
        next(vae.parameters()).device,
        torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).split(batch),
    )
    return to_pixels(
        vae, torch.cat([encode(vae, part.to(device).float() / 127.5 - 1.0).cpu() for part in parts]), batch
    )


@torch.no_grad()
def to_pixels(
    vae, latents: Tensor, batch: int = 16, report: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Decode normalised latents `[n, C, f, h, w]` to pixels, uint8 `[n, F, H, W, 3]`."""
    out = []
    for part in latents.split(batch):
        x = decode(vae, part.to(next(vae.parameters()).device))
        out.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy())
        report(len(part))
    return np.concatenate(out)
