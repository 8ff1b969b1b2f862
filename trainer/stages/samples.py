"""Pictures during training, from fixed noise and prompts: the current weights beside their average."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from apt_core.files.media_write import write_image, write_video
from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from trainer.aside import Aside
from trainer.machines.distributed import World
from trainer.stages.averages import Averages


@dataclass(frozen=True)
class Samples:
    """Every `every` updates, writes one file per prompt to `folder`: left the sample of the current weights,
    right that of their average.

    text: padded embeddings `[n, L, d]`, one per prompt.
    shape: of one latent, `(C, F, h, w)`.
    to_video: decodes latents `[1, C, F, h, w]` to uint8 `[1, F, H, W, 3]`; only the main process calls it.
    """

    folder: Path
    every: int
    text: Tensor
    shape: Sequence[int]
    to_video: Callable[[Tensor], np.ndarray]
    fps: float
    seed: int = 0
    aside: Aside = field(default_factory=lambda: Aside("the samples"))

    def show(self, update: int, generator: nn.Module, averages: Averages, world: World) -> None:
        """Write the files if they are due after this update. All processes must call this together."""
        if update % self.every:
            return
        raw = self._latents(generator, world)
        with averages.applied():
            mean = self._latents(generator, world)
        if not world.main:
            return
        self.aside(self._write, update, raw, mean)

    def _write(self, update: int, raw: list[Tensor], mean: list[Tensor]) -> None:
        for number, pair in enumerate(zip(raw, mean)):
            pixels = np.concatenate([self.to_video(latent)[0] for latent in pair], axis=2)
            stem = self.folder / f"{update:06d}-{number:02d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            if len(pixels) == 1:
                write_image(stem.with_suffix(".png"), pixels[0])
            else:
                write_video(stem.with_suffix(".mp4"), pixels, self.fps)

    @torch.no_grad()
    def _latents(self, generator: nn.Module, world: World) -> list[Tensor]:
        out = []
        for number, text in enumerate(self.text):
            z = sample_noise([number], self.shape, self.seed, "samples/z").to(world.device)
            out.append(one_step(generator, z, text[None].to(world.device)).cpu())
        return out
