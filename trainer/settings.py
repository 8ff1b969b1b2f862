"""Every setting of a run, as typed, frozen models. Each field's docstring says what it means;
`python -m trainer settings` prints them all.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from apt_core.loading.backbones import kinds
from apt_core.method.consistency import ConsistencySettings
from apt_core.method.dmd import DmdSettings, Weighting
from apt_core.method.objectives import Objective
from apt_core.models.wan import PAPER_FRACTIONS


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Settings):
    """Shape of the base model. Memory and time are computed from it, without reading weights."""

    kind: str = "wan"
    """Kind of backbone, see apt_core.loading.backbones."""
    layers: int = Field(ge=1)
    """Number of transformer blocks."""
    heads: int = Field(ge=1)
    """Attention heads."""
    head_dim: int = Field(ge=2)
    """Width of an attention head."""
    ffn: int = Field(ge=1)
    """Inner width of the feed-forward layers."""
    channels: int = Field(ge=1)
    """Channels of the latents."""
    text_dim: int = Field(4096, ge=1)
    """Width of the text embeddings."""
    text_length: int = Field(512, ge=2)
    """Tokens that a caption is padded to."""
    vae: Literal["2.1", "2.2"] = "2.1"
    """Version of Wan's VAE whose latents the model uses."""

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
    """Where the weights are: a diffusers folder, or a single file that ComfyUI takes. "mini" is the shipped
    miniature's; empty means not given.
    """

    base: str = ""
    """The original transformer."""
    vae: str = ""
    """The VAE."""
    text_encoder: str = ""
    """The text encoder."""
    tokenizer: str = ""
    """A folder with spiece.model, or that file; needed if the text encoder has none in it."""


class Data(Settings):
    """What samples are cropped and resampled to."""

    height: int = Field(ge=16)
    """Pixels of clips."""
    width: int = Field(ge=16)
    """Pixels of clips."""
    frames: int = Field(ge=1)
    """Frames of a clip, 4 n + 1."""
    fps: float = Field(ge=1, le=240)
    """Frames per second."""
    image_height: int | None = Field(None, ge=16)
    """Pixels of images; none: as clips."""
    image_width: int | None = Field(None, ge=16)
    """Pixels of images; none: as clips."""
    aspects: tuple[str, ...] = ()
    """Aspect ratios such as 16:9; each file gets the nearest one, with as many pixels as height x width
    (none: every file is cropped to height x width)."""
    shorter: tuple[int, ...] = ()
    """Numbers of frames for clips that are shorter than frames."""
    clips_per_file: int = Field(1, ge=1)
    """How many clips at most are cut from a long video, one after another."""
    images: int = Field(0, ge=0)
    """How many images the demo draws."""
    clips: int = Field(0, ge=0)
    """How many clips the demo draws."""
    held_out: int = Field(64, ge=0)
    """Samples of each kind that are kept from training (at most a tenth), for trainer.stages.watch."""

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
    """How the base model is sampled, and what sample pictures show."""

    steps: int = Field(25, ge=1)
    """Euler steps."""
    guidance: float
    """Scale of classifier-free guidance."""
    shift_image: float = Field(gt=0)
    """Shift of the times, for images."""
    shift_video: float = Field(gt=0)
    """Shift of the times, for clips."""
    negative_prompt: str
    """The fixed negative prompt."""
    second_time: float = Field(gt=0, lt=1)
    """Time of the second step in two-step sampling; it is written to every file of the run."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample pictures during training."""

    def shift(self, kind: str) -> float:
        return self.shift_image if kind == "image" else self.shift_video


ONLY_OF = {
    "consistency": ("steps", "fraction_at_final", "target_decay", "target_warmup"),
    "dmd": (
        "fake_updates",
        "lr_fake",
        "t_min",
        "t_max",
        "t_shift",
        "weighting",
        "regression",
        "regression_steps",
    ),
}
"""Settings of stage 1 that only one of its methods looks at."""


class Distill(Settings):
    """Stage 1."""

    method: Literal["consistency", "dmd"] = "consistency"
    """Consistency (the paper's) or dmd, distribution matching (apt_core.method.dmd)."""
    updates: int = Field(ge=1)
    """Number of updates."""
    batch_image: int = Field(ge=1)
    """Samples in an update on images."""
    batch_video: int = Field(ge=1)
    """Samples in an update on clips."""
    video_share: float = Field(ge=0, le=1)
    """Share of the updates that train on clips."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Muon is for models as small as the miniature."""
    lr: float = Field(gt=0)
    """Learning rate."""
    lr_end: float | None = Field(None, gt=0)
    """Learning rate that lr falls to in a straight line; none: it stays."""
    lr_warmup: int = Field(0, ge=0)
    """Updates in which the learning rate rises to lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    steps: int = Field(ge=1)
    """consistency: number of discrete times."""
    guidance: float = Field(ge=1)
    """Guidance scale of the teacher; dmd: of the real score."""
    fraction_at_final: float = Field(ge=0, le=1)
    """consistency: share of the samples at the last time."""
    target_decay: float = Field(ge=0, lt=1)
    """consistency: EMA decay of the target network; 0: the student itself."""
    target_warmup: float = Field(0.0, ge=0)
    """consistency: as ema_warmup, for the target network."""
    ema_decay: float = Field(ge=0, lt=1)
    """Decay of the EMA that becomes the result."""
    ema_warmup: float = Field(0.0, ge=0)
    """Lets a young EMA forget the start sooner (apt_core.method.ema.Ema); 0: the plain decay."""
    fake_updates: int = Field(5, ge=1)
    """dmd: updates of the fake score, a LoRA of train.lora_rank, for each update of the generator (DMD2: 5).
    """
    lr_fake: float | None = Field(None, gt=0)
    """dmd: learning rate of the fake score, which rises and falls as lr does; none: lr."""
    t_min: float = Field(0.02, gt=0, le=1)
    """dmd: the earliest time that samples are noised to."""
    t_max: float = Field(0.98, gt=0, le=1, validate_default=True)
    """dmd: the latest time that samples are noised to."""
    t_shift: float | None = Field(None, gt=0)
    """dmd: shift of those times; none: that of the base's own sampling."""
    weighting: Weighting = "dmd"
    """dmd: see apt_core.method.dmd.DmdSettings."""
    regression: float = Field(0.0, ge=0)
    """dmd: weight of the distance to the base's own sample from the same noise; 0: no such samples are made.
    """
    regression_steps: int | None = Field(None, ge=1)
    """dmd: guided Euler steps of that sample, each of which calls the base; none: sampling.steps."""

    @property
    def idle(self) -> set[str]:
        """Names of the settings that the method does not look at."""
        return set(ONLY_OF["dmd" if self.method == "consistency" else "consistency"])

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
    """One phase of stage 2 (table in section 3.5).

    taps, discriminator_time, discriminator_start and train_backbone are choices that the paper tried and
    decided against (sections 3.3 and 5.2); the defaults are the paper's.
    """

    updates: int = Field(ge=1)
    """Number of updates of the generator."""
    batch: int = Field(ge=1)
    """Samples in an update."""
    lr_generator: float = Field(gt=0)
    """Learning rate of the generator."""
    lr_discriminator: float = Field(gt=0)
    """Learning rate of the discriminator."""
    lr_heads: float | None = Field(None, gt=0)
    """Learning rate of the discriminator's new heads; none: lr_discriminator, as in the paper."""
    warmup: int = Field(0, ge=0)
    """Updates at the start that train only the discriminator."""
    ema_decay: float = Field(ge=0, lt=1)
    """Decay of the EMA that becomes the result."""
    ema_warmup: float = Field(0.0, ge=0)
    """Lets a young EMA forget the start sooner (apt_core.method.ema.Ema); 0: the plain decay, as in the
    paper."""
    shift: float = Field(gt=0)
    """S of equation 7, for the discriminator's timesteps."""
    relativistic: bool = False
    """A relativistic pair loss instead of the paper's."""
    r1_weight: float = Field(ge=0)
    """Weight lambda of aR1; 0: none."""
    r1_sigma: float = Field(gt=0)
    """Sigma of aR1's noise."""
    r1_sigma_time: float | None = Field(None, gt=0)
    """AR1's sigma for what differs between frames, r1_sigma then being for what they share
    (apt_core.method.objectives.perturbation); none: one sigma, as in the paper."""
    r2_weight: float = Field(0.0, ge=0)
    """Weight lambda of aR2; 0: none."""
    r2_sigma: float = Field(0.01, gt=0)
    """Sigma of aR2's noise."""
    r2_sigma_time: float | None = Field(None, gt=0)
    """As r1_sigma_time, for aR2."""
    reg_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the batch that the penalties see."""
    centering: float = Field(0.0, ge=0)
    """Weight of the penalty on the mean of the logits."""
    discriminator_step: Literal["batched", "separate", "two_pass"] = "batched"
    """How the discriminator's passes are run (mode of apt_core.method.objectives.discriminator_backward)."""
    taps: tuple[float, ...] = PAPER_FRACTIONS
    """Depths of the discriminator's heads, as fractions of the base's blocks; the last one is the depth of
    the discriminator."""
    discriminator_time: float | None = Field(None, ge=0, le=1)
    """One timestep in [0, 1] for all samples instead of those of equation 6."""
    discriminator_start: Literal["base", "start"] = "base"
    """Base, or start: the weights that the generator starts from."""
    train_backbone: bool = True
    """False trains only the discriminator's heads."""

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
    """A recipe: both phases of stage 2, and what it changes of the other settings."""

    image: Adversarial
    """The image phase."""
    video: Adversarial
    """The video phase."""
    also: dict[str, Any] = {}
    """By full name (distill.guidance), what the recipe changes of the preset's other settings."""


class Train(Settings):
    """How a run uses its machines, and what it writes. Except for mode and the LoRA settings, nothing here
    changes the training, apart from rounding.
    """

    mode: Literal["full", "lora"] = "full"
    """Full trains all weights; lora trains adapters on one frozen base that all networks share."""
    lora_rank: int = Field(64, ge=1)
    """Rank of the adapters."""
    lora_alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by lora_alpha / lora_rank; none: by 1."""
    head_width: int | None = Field(None, ge=1)
    """Inner width of the discriminator's heads; none: the model's own."""
    microbatch: int | None = Field(None, ge=1)
    """Samples that a process computes at once; none: its whole share."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products."""
    generator_zero: Literal[2, 3] = 3
    """ZeRO stage of the generator, see trainer.machines.parallel.Parallel."""
    discriminator_zero: Literal[2, 3] = 3
    """ZeRO stage of the discriminator."""
    sync_every_microbatch: bool = False
    """Reduce gradients after every microbatch instead of once per update."""
    checkpointing: Literal["none", "blocks", "offload"] = "none"
    """Activation checkpointing; offload keeps the blocks' inputs in the CPU's memory."""
    compile: str | None = None
    """Torch.compile the blocks with this backend."""
    context_parallel: int = Field(1, ge=1)
    """Processes that divide the tokens of one sample."""
    attention: str = "auto"
    """Attention backend by diffusers' name; auto: the fastest installed one with a backward pass."""
    device: str = "auto"
    """Auto: the GPU if there is one."""
    ema_decays: tuple[float, ...] = ()
    """Decays of additional EMAs."""
    save_every: int = Field(50, ge=0)
    """Updates between two training states; 0: none."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest states are kept."""
    keep_best: int = Field(1, ge=0)
    """How many of the best states are kept in addition, by trainer.run.judge."""
    judge_samples: int = Field(64, ge=0)
    """Samples that judge a state; 0: states are not judged."""
    sample_every: int = Field(0, ge=0)
    """Updates between two sets of sample pictures; 0: none."""
    watch_every: int = Field(10, ge=0)
    """Updates between two measurements on held-out samples, of the discriminator and of motion; 0: none."""
    wandb: str | None = None
    """Weights & Biases project to report to, if the package is installed."""
