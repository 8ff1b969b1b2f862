"""Presets: TOML files that hold every number of a training run, read into typed, frozen models."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_core.consistency import ConsistencySettings
from apt_core.errors import AptError
from apt_core.objectives import Objective

PRESETS = Path(__file__).parent / "presets"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Settings):
    """What samples are cut to: pixels, frames (4 n + 1), frames a second; `images` and `clips` are how many the demo draws."""

    height: int = Field(ge=16)
    width: int = Field(ge=16)
    frames: int = Field(ge=1)
    fps: float = Field(gt=0)
    images: int = Field(ge=1)
    clips: int = Field(ge=1)


class Sampling(Settings):
    """How the base samples: Euler steps, guidance scale, shift of its times for images and videos, and the fixed negative prompt.
    `second_time` is the second of the two times of two-step sampling."""

    steps: int = Field(25, ge=1)
    guidance: float
    shift_image: float = Field(gt=0)
    shift_video: float = Field(gt=0)
    negative_prompt: str
    second_time: float = Field(gt=0, lt=1)

    def shift(self, kind: str) -> float:
        return self.shift_image if kind == "image" else self.shift_video


class Distill(Settings):
    """Stage 1. `video_share` of the updates see clips; `target_decay` is the EMA of the target network (0: the student itself); the rate
    rises over `lr_warmup` updates and falls in a line from `lr` to `lr_end` (none: it stays). Muon is for models as small as the miniature."""

    updates: int = Field(ge=1)
    batch_image: int = Field(ge=1)
    batch_video: int = Field(ge=1)
    video_share: float = Field(ge=0, le=1)
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = Field(gt=0)
    lr_end: float | None = Field(None, gt=0)
    lr_warmup: int = Field(0, ge=0)
    steps: int = Field(ge=1)
    guidance: float = Field(ge=1)
    fraction_at_final: float = Field(ge=0, le=1)
    target_decay: float = Field(ge=0, lt=1)
    ema_decay: float = Field(ge=0, lt=1)

    def rate(self, update: int) -> float:
        """The learning rate of update number `update`, counted from 0."""
        end = self.lr if self.lr_end is None else self.lr_end
        return (self.lr + (end - self.lr) * update / self.updates) * min(1.0, (update + 1) / max(1, self.lr_warmup))

    def consistency(self, shift: float) -> ConsistencySettings:
        return ConsistencySettings(self.steps, shift, self.guidance, self.fraction_at_final)


class Adversarial(Settings):
    """One phase of stage 2 (table in 3.5). `shift` is s of eq. 7 for the discriminator's timesteps; `warmup` updates train the
    discriminator alone; `mode` is the discriminator step's (apt_core.objectives)."""

    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr_generator: float = Field(gt=0)
    lr_discriminator: float = Field(gt=0)
    warmup: int = Field(0, ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    shift: float = Field(gt=0)
    relativistic: bool = False
    r1_weight: float = Field(ge=0)
    r1_sigma: float = Field(gt=0)
    r2_weight: float = Field(0.0, ge=0)
    r2_sigma: float = Field(0.01, gt=0)
    reg_fraction: float = Field(1.0, gt=0, le=1)
    centering: float = Field(0.0, ge=0)
    mode: Literal["batched", "separate", "two_pass"] = "batched"

    def objective(self) -> Objective:
        return Objective(
            self.relativistic, self.r1_weight, self.r1_sigma, self.r2_weight, self.r2_sigma, self.reg_fraction, self.centering
        )


class Phases(Settings):
    image: Adversarial
    video: Adversarial


class Preset(Settings):
    """A whole recipe. `stage2` holds its named variants: `paper` and `stable`."""

    name: str
    data: Data
    sampling: Sampling
    distill: Distill
    stage2: dict[str, Phases]

    def phases(self, variant: str) -> Phases:
        """The two phases of a variant. Raises AptError for a name that the preset does not have."""
        if variant not in self.stage2:
            raise AptError(f"preset {self.name} has no stage 2 named {variant!r}; it has {', '.join(self.stage2)}.")
        return self.stage2[variant]


def load_preset(name: str | Path) -> Preset:
    """A preset by name (`mini`) or from a TOML file. Raises AptError for an unknown name or an invalid value, naming both."""
    path = Path(name) if str(name).endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise AptError(f"there is no preset {str(name)!r}; use one of {known}, or the path of a .toml file.")
    try:
        return Preset.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        raise AptError(f"preset {path.name} cannot be read: give a TOML file in UTF-8 that you may read.") from None
    except tomllib.TOMLDecodeError as error:
        raise AptError(f"preset {path.name} is not valid TOML: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise AptError(f"preset {path.name}: {where} is missing: add it.") from None
        raise AptError(f"preset {path.name}: {where} is {first.get('input')!r}: {first['msg'].lower()}.") from None
