"""Presets: TOML files that hold every number of a training run, read into typed, frozen models; `key=value`
changes single numbers.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from apt_core.errors import AptError
from apt_core.loading.backbones import kinds
from apt_core.method.consistency import ConsistencySettings
from apt_core.method.dmd import DmdSettings, Weighting
from apt_core.method.objectives import Objective
from apt_core.models.wan import PAPER_FRACTIONS
from trainer.overrides import apply, known_names, nearest

PRESETS = Path(__file__).parent / "presets"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Settings):
    """Shape of the base model, so that accounts can be made without a weight. vae: the version whose latents
    it has; kind: see apt_core.loading.backbones.
    """

    kind: str = "wan"
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    ffn: int = Field(ge=1)
    channels: int = Field(ge=1)
    text_dim: int = Field(4096, ge=1)
    text_length: int = Field(512, ge=2)
    vae: Literal["2.1", "2.2"] = "2.1"

    @field_validator("kind")
    @classmethod
    def _is_registered(cls, kind: str) -> str:
        if kind not in kinds():
            raise ValueError(f"it must be one of {', '.join(kinds())}")
        return kind

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in (frames, height, width)."""
        return (4, 8, 8) if self.vae == "2.1" else (4, 16, 16)


class Files(Settings):
    """Where the weights lie: a diffusers folder or the single file that ComfyUI takes; "mini" is the shipped
    one, empty means not given.
    `tokenizer` (a folder with spiece.model, or that file) is needed where the text encoder does not carry its
    own.
    """

    base: str = ""
    vae: str = ""
    text_encoder: str = ""
    tokenizer: str = ""


class Data(Settings):
    """What samples are cut to: pixels, frames (4 n + 1), frames a second. Images have a size of their own
    where one is given.

    aspects: "16:9" and so on; files go to the nearest one, with the pixels of height x width (none: all are
    cropped to that); shorter: numbers of frames for clips that are shorter than `frames`; clips_per_file: how
    many clips are cut from a long video, one after the other; `images` and `clips` are how many the demo
    draws. held_out: so many samples of each kind are kept from training (a tenth of them at most), for
    trainer.stages.watch.
    """

    height: int = Field(ge=16)
    width: int = Field(ge=16)
    frames: int = Field(ge=1)
    fps: float = Field(ge=1, le=240)
    image_height: int | None = Field(None, ge=16)
    image_width: int | None = Field(None, ge=16)
    aspects: tuple[str, ...] = ()
    shorter: tuple[int, ...] = ()
    clips_per_file: int = Field(1, ge=1)
    images: int = Field(0, ge=0)
    clips: int = Field(0, ge=0)
    held_out: int = Field(64, ge=0)

    @field_validator("aspects", "shorter", mode="before")
    @classmethod
    def _one_of_its_own(cls, value):
        return (value,) if isinstance(value, str | int) and value != "" else value

    def size(self, kind: str) -> tuple[int, int]:
        """(height, width) of "image" or "video"."""
        if kind == "image":
            return self.image_height or self.height, self.image_width or self.width
        return self.height, self.width

    def native(self, kind: str) -> dict:
        """What a checkpoint that was trained on "image" or "video" says of its size."""
        height, width = self.size(kind)
        return {
            "height": height,
            "width": width,
            "frames": 1 if kind == "image" else self.frames,
            "fps": self.fps,
        }


class Sampling(Settings):
    """How the base samples: Euler steps, guidance scale, shift of its times for images and videos, and the
    fixed negative prompt.
    `second_time` is the second of the two times of two-step sampling, which goes into every file of the run;
    `prompts` are what sample videos show while a run trains.
    """

    steps: int = Field(25, ge=1)
    guidance: float
    shift_image: float = Field(gt=0)
    shift_video: float = Field(gt=0)
    negative_prompt: str
    second_time: float = Field(gt=0, lt=1)
    prompts: tuple[str, ...] = ()

    def shift(self, kind: str) -> float:
        return self.shift_image if kind == "image" else self.shift_video


class Distill(Settings):
    """Stage 1. method: "consistency", the paper's, or "dmd", distribution matching (apt_core.method.dmd).
    `video_share` of the updates see clips; `guidance` is the teacher's (of dmd, the real score's);
    `ema_warmup` lets a young average forget the start sooner (apt_core.method.ema.Ema; 0: the plain decay);
    the rate rises over `lr_warmup` updates and falls in a line from `lr` to `lr_end` (none: it stays). Muon is
    for models as small as the miniature.

    Of consistency alone: `steps`, `fraction_at_final`, `target_decay`, the EMA of the target network (0: the
    student itself), and `target_warmup`.

    Of dmd alone: `fake_updates` of the fake score, a LoRA of `train.lora_rank`, to each one of the generator
    (DMD2: 5), at `lr_fake` (none: `lr`; it rises and falls as that does); samples are noised to times in
    [`t_min`, `t_max`], shifted by `t_shift` (none: as the base samples); `weighting`, see
    apt_core.method.dmd.DmdSettings; `regression` is the weight of the distance to the base's own sample in
    `regression_steps` guided Euler steps (none: `sampling.steps`) from the same noise, which costs that many
    more calls of the base (0: none are made).
    """

    method: Literal["consistency", "dmd"] = "consistency"
    updates: int = Field(ge=1)
    batch_image: int = Field(ge=1)
    batch_video: int = Field(ge=1)
    video_share: float = Field(ge=0, le=1)
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = Field(gt=0)
    lr_end: float | None = Field(None, gt=0)
    lr_warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    steps: int = Field(ge=1)
    guidance: float = Field(ge=1)
    fraction_at_final: float = Field(ge=0, le=1)
    target_decay: float = Field(ge=0, lt=1)
    target_warmup: float = Field(0.0, ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_warmup: float = Field(0.0, ge=0)
    fake_updates: int = Field(5, ge=1)
    lr_fake: float | None = Field(None, gt=0)
    t_min: float = Field(0.02, gt=0, le=1)
    t_max: float = Field(0.98, gt=0, le=1)
    t_shift: float | None = Field(None, gt=0)
    weighting: Weighting = "dmd"
    regression: float = Field(0.0, ge=0)
    regression_steps: int | None = Field(None, ge=1)

    @field_validator("t_max")
    @classmethod
    def _is_above_t_min(cls, t_max: float, info: ValidationInfo) -> float:
        if t_max < info.data.get("t_min", 0):
            raise ValueError(f"it must not be below t_min, {info.data['t_min']}")
        return t_max

    def rate(self, update: int) -> float:
        """The learning rate of update number `update`, counted from 0."""
        end = self.lr if self.lr_end is None else self.lr_end
        return (self.lr + (end - self.lr) * update / self.updates) * min(
            1.0, (update + 1) / max(1, self.lr_warmup)
        )

    def rate_of_fake(self, update: int) -> float:
        """Of the fake score's updates before the generator's update of this number."""
        return self.rate(update) * (self.lr_fake or self.lr) / self.lr

    def consistency(self, shift: float) -> ConsistencySettings:
        return ConsistencySettings(self.steps, shift, self.guidance, self.fraction_at_final)

    def matching(self, shift: float) -> DmdSettings:
        """shift: of the base's own sampling."""
        times = self.t_min, self.t_max, self.t_shift or shift
        return DmdSettings(*times, self.guidance, self.weighting, self.regression)


class Adversarial(Settings):
    """One phase of stage 2 (table in 3.5). `shift` is s of eq. 7 for the discriminator's timesteps; `warmup`
    updates train the discriminator alone; `lr_heads` is the rate of its heads, which start from nothing
    (none: `lr_discriminator`, as in the paper); `ema_warmup` lets a young average forget the start sooner,
    see apt_core.method.ema.Ema (0: the plain decay, as in the paper); `discriminator_step` is how its passes
    are run (the mode of apt_core.method.objectives); `r1_sigma_time` and `r2_sigma_time` are sigmas of their
    own for what differs between frames, r1_sigma then being for what frames share (none: one sigma, as in the
    paper; see apt_core.method.objectives.perturbation).

    What the paper tried on the discriminator and decided against (3.3, 5.2), its choice as default: `taps`,
    the depths of its heads as fractions of the base's blocks (the last of them is its own depth);
    `discriminator_time`, one timestep in [0, 1] for all samples in the place of those of eq. 6;
    `discriminator_start`, "base" or "start" (the weights that the generator starts from: the distilled ones,
    or the image phase's); `train_backbone`, false to train the heads alone.
    """

    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr_generator: float = Field(gt=0)
    lr_discriminator: float = Field(gt=0)
    lr_heads: float | None = Field(None, gt=0)
    warmup: int = Field(0, ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_warmup: float = Field(0.0, ge=0)
    shift: float = Field(gt=0)
    relativistic: bool = False
    r1_weight: float = Field(ge=0)
    r1_sigma: float = Field(gt=0)
    r1_sigma_time: float | None = Field(None, gt=0)
    r2_weight: float = Field(0.0, ge=0)
    r2_sigma: float = Field(0.01, gt=0)
    r2_sigma_time: float | None = Field(None, gt=0)
    reg_fraction: float = Field(1.0, gt=0, le=1)
    centering: float = Field(0.0, ge=0)
    discriminator_step: Literal["batched", "separate", "two_pass"] = "batched"
    taps: tuple[float, ...] = PAPER_FRACTIONS
    discriminator_time: float | None = Field(None, ge=0, le=1)
    discriminator_start: Literal["base", "start"] = "base"
    train_backbone: bool = True

    def objective(self) -> Objective:
        return Objective(
            self.relativistic,
            self.r1_weight,
            self.r1_sigma,
            self.r2_weight,
            self.r2_sigma,
            self.reg_fraction,
            self.centering,
            self.r1_sigma_time,
            self.r2_sigma_time,
        )


class Phases(Settings):
    """A recipe: both phases of stage 2, and by full name (`distill.guidance`) what it changes of the preset's
    other settings.
    """

    image: Adversarial
    video: Adversarial
    also: dict[str, Any] = {}


class Train(Settings):
    """How a run uses its machines, and what it leaves while it runs. Nothing here but `mode` and the LoRA
    changes what is learned beyond rounding.

    mode: "full" trains all weights, "lora" adapters of rank `lora_rank` on one frozen base that all networks
    share; head_width: inner width of the discriminator's heads (none: the model's own). microbatch: samples
    that a process takes at once (none: its whole share); compute, generator_zero, discriminator_zero,
    sync_every_microbatch, checkpointing, compile, context_parallel: see trainer.machines.parallel.Parallel.
    attention: diffusers' name of a backend for all networks, "auto" for the fastest installed one that has a
    backward pass. device: "auto" takes the GPU where there is one. ema_decays: more averages to keep beside
    the phase's own. save_every, sample_every, watch_every (looks at the discriminator and the motion of
    clips on held-out samples), in updates, 0: never; keep_last: how many of the newest checkpoints to keep; keep_best: how many of the
    best besides, by trainer.run.judge on judge_samples samples (0: none are judged). wandb: a Weights &
    Biases project to report to, where that is installed.
    """

    mode: Literal["full", "lora"] = "full"
    lora_rank: int = Field(64, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    head_width: int | None = Field(None, ge=1)
    microbatch: int | None = Field(None, ge=1)
    compute: Literal["fp32", "bf16"] = "fp32"
    generator_zero: Literal[2, 3] = 3
    discriminator_zero: Literal[2, 3] = 3
    sync_every_microbatch: bool = False
    checkpointing: Literal["none", "blocks", "offload"] = "none"
    compile: str | None = None
    context_parallel: int = Field(1, ge=1)
    attention: str = "auto"
    device: str = "auto"
    ema_decays: tuple[float, ...] = ()
    save_every: int = Field(50, ge=0)
    keep_last: int = Field(2, ge=1)
    keep_best: int = Field(1, ge=0)
    judge_samples: int = Field(64, ge=0)
    sample_every: int = Field(0, ge=0)
    watch_every: int = Field(10, ge=0)
    wandb: str | None = None


class Preset(Settings):
    """A whole recipe. `stage2` holds its named variants: `paper`, and `stable` or `budget`; the first is the
    default.
    """

    name: str
    model: Model
    files: Files = Files()
    data: Data
    sampling: Sampling
    distill: Distill
    train: Train = Train()
    stage2: dict[str, Phases] = Field(min_length=1)

    @property
    def variant(self) -> str:
        return next(iter(self.stage2))

    def phases(self, variant: str) -> Phases:
        """The two phases of a variant. Raises AptError for a name that the preset does not have."""
        if variant not in self.stage2:
            raise AptError(
                f"preset {self.name} has no stage 2 named {variant!r}; it has {', '.join(self.stage2)}."
            )
        return self.stage2[variant]

    def with_recipe(
        self, variant: str, overrides: Sequence[str] = (), sections: Sequence[str] = ()
    ) -> "Preset":
        """The preset with what a variant changes of its other settings, but for what `overrides` say, as in
        `load_preset`: the command line has the last word. Raises AptError as `phases`, and for a setting that
        is not there.
        """
        return self.changed(self.phases(variant).also, variant, overrides, sections)

    def changed(
        self,
        changes: Mapping[str, Any],
        variant: str,
        overrides: Sequence[str] = (),
        sections: Sequence[str] = (),
    ) -> "Preset":
        """The preset with settings by full name as a variant has them; else as `with_recipe`."""
        values = self.model_dump()
        for name, value in changes.items():
            section, _, key = name.partition(".")
            if not isinstance(values.get(section), dict) or key not in values[section]:
                raise AptError(
                    f"preset {self.name}: there is no setting {name}{nearest(name, known_names(Preset, values))}, which {variant} changes: mend it."
                )
            values[section][key] = value
        values = apply(values, overrides, known_names(Preset, values), sections)
        try:
            return Preset.model_validate(values)
        except ValidationError as error:
            raise _sentence(f"{self.name}, recipe {variant}", error.errors()[0], values) from None


def load_preset(name: str | Path, overrides: Sequence[str] = (), sections: Sequence[str] = ()) -> Preset:
    """A preset by name (`mini`) or from a TOML file, with `key=value` overrides.

    A key is a full name (`distill.updates`) or the last part of one, which is then looked for in `sections`,
    in that order.
    Raises AptError for an unknown preset or key, with the nearest right one, and for an invalid value, naming
    it.
    """
    path = Path(name) if str(name).endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = [p.stem for p in sorted(PRESETS.glob("*.toml"))]
        raise AptError(
            f"there is no preset {str(name)!r}{nearest(str(name), known)}; use one of {', '.join(known)}, or the path of a .toml file."
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return Preset.model_validate(apply(values, overrides, known_names(Preset, values), sections))
    except (OSError, UnicodeDecodeError):
        raise AptError(
            f"preset {path.name} cannot be read: give a TOML file in UTF-8 that you may read."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise AptError(f"preset {path.name} is not valid TOML: {error}.") from None
    except ValidationError as error:
        raise _sentence(path.name, error.errors()[0], values) from None


def comparable(preset: Mapping, recipe: str) -> dict:
    """A preset as a run has written it down, by this version or by one that had fewer settings and recipes:
    what is new is filled in, and of the recipes stays the run's own. Raises pydantic's ValidationError (a
    ValueError).
    """
    whole = Preset.model_validate(preset).model_dump(mode="json")
    return whole | {"stage2": {name: one for name, one in whole["stage2"].items() if name == recipe}}


def _sentence(file: str, first: dict, values: dict) -> AptError:
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return AptError(f"preset {file}: {where} is missing: add it.")
    if first["type"] == "extra_forbidden":
        return AptError(
            f"preset {file}: there is no setting {where}{nearest(where, known_names(Preset, values))}: mend or remove it."
        )
    return AptError(f"preset {file}: {where} is {first.get('input')!r}: {first['msg'].lower()}.")
