"""A request to a pipeline: prompts, sizes, steps, and the number of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import cast

from ..errors import AptError
from ..loading.sources import Sources
from ..method.noise import APT, check_noise
from ..models.latents import check_size


@dataclass(frozen=True)
class Request:
    """height, width, frames, fps: by default what the checkpoint was trained for; one frame is a picture.
    count: samples of each prompt; steps: calls of the network. An APT or distilled model re-noises at the
    times of `steps.step_times`; a base model takes Euler steps, with guidance, shift and negative, which no
    other model has. noise: "apt", the default, with which no two samples share noise, whatever their seeds
    and the number of processes; or "comfyui", with which sample n is what the ComfyUI node and stock KSampler
    make of seed + n.

    Sample number n belongs to prompt `n // count`. Its noise depends only on (seed, n).
    """

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
    noise: str = APT

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.count

    @property
    def texts(self) -> list[str]:
        """All texts to encode: the prompts, and with guidance the negative prompt."""
        return [*self.prompts] if self.guidance == 1 else [*self.prompts, self.negative]

    @property
    def sizes(self) -> tuple[int, int, int, float]:
        """Height, width, frames and fps, after `fitted` has filled them in."""
        return cast("tuple[int, int, int, float]", (self.height, self.width, self.frames, self.fps))

    def prompt(self, number: int) -> str:
        return self.prompts[number // self.count]

    def about(self, number: int) -> dict:
        """What a sample's file says about itself: the prompt, seed and number that it was made from."""
        return {"prompt": self.prompt(number), "seed": int(self.seed), "number": number}

    def fitted(self, sources: Sources) -> "Request":
        """The request with every size filled in. Raises AptError for sizes that the model cannot make, for
        NaN and other impossible values, and when there is nothing to make.
        """
        if not self.prompts:
            raise AptError("there is no prompt: give one or more.")
        self._check_values()
        if min(self.count, self.steps) < 1:
            raise AptError(
                f"{self.count} samples in {self.steps} steps cannot be made: both must be 1 or more."
            )
        if sources.transformer.few_step:
            self._check_unguided(sources.transformer.name)
        sizes = {
            name: value if getattr(self, name) is None else getattr(self, name)
            for name, value in sources.transformer.native.items()
            if name in SIZES
        }
        if not SLOWEST <= sizes["fps"] <= FASTEST:
            raise AptError(
                f"fps is {sizes['fps']:g}, but a video has {SLOWEST:g} to {FASTEST:g} frames a second."
            )
        patch = sources.transformer.patch
        check_size(
            sizes["height"], sizes["width"], sizes["frames"], sources.vae.stride, patch, what="a sample"
        )
        return replace(self, **sizes)

    def _check_unguided(self, model: str) -> None:
        for name in OF_BASES:
            value = getattr(self, name)
            if value != getattr(Request, name):
                raise AptError(
                    f"{name} {value!r} is for base models, but {model} is an APT or distilled one, "
                    f"which has no {name}: leave it out."
                )

    def _check_values(self) -> None:
        check_noise(self.noise)
        for text in (*self.prompts, self.negative):
            if not isinstance(text, str) or text != text.encode(errors="ignore").decode():
                raise AptError(f"the prompt {text!r} cannot be read: give text that can be written as UTF-8.")
        for name in ("count", "seed", "steps", "height", "width", "frames"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and (value is not None or name not in SIZES):
                raise AptError(f"{name} is {value!r}, but must be a whole number.")
        for name in ("fps", "guidance", "shift"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and math.isfinite(value)) and (
                value is not None or name not in SIZES
            ):
                raise AptError(f"{name} is {value!r}, but must be a finite number.")
        if self.shift <= 0:
            raise AptError(f"shift is {self.shift:g}, but must be above 0.")

    def latents(self, sources: Sources) -> tuple[int, int, int, int]:
        """The shape of one sample's latents, [channels, frames, rows, columns], after `fitted`."""
        t, down, across = sources.vae.stride
        height, width, frames, _ = self.sizes
        return sources.vae.channels, (frames - 1) // t + 1, height // down, width // across


SLOWEST, FASTEST = 0.1, 240.0
SIZES = ("height", "width", "frames", "fps")
OF_BASES = ("guidance", "shift", "negative")
