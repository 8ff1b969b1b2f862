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
    """Kind of backbone: wan, mmdit, or one of your own (see CONTRIBUTING.md)."""
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
    """Where the weights are: a diffusers folder, or a single file as ComfyUI loads it. "mini" takes the file
    of the miniature that comes with this project; none: not given.
    """

    base: str = ""
    """The original transformer."""
    vae: str = ""
    """The VAE."""
    text_encoder: str = ""
    """The text encoder."""
    tokenizer: str = ""
    """The folder with spiece.model, or that file; only needed if the text encoder's file has no tokenizer in
    it."""


class Data(Settings):
    """The size and frame rate that your clips and images are cropped and resampled to."""

    height: int = Field(ge=16)
    """Height of clips in pixels."""
    width: int = Field(ge=16)
    """Width of clips in pixels."""
    frames: int = Field(ge=1)
    """Frames of a clip: 1 more than a multiple of 4."""
    fps: float = Field(ge=1, le=240)
    """Frames per second."""
    image_height: int | None = Field(None, ge=16)
    """Height of images in pixels; none: the same as of clips."""
    image_width: int | None = Field(None, ge=16)
    """Width of images in pixels; none: the same as of clips."""
    aspects: tuple[str, ...] = ()
    """Aspect ratios such as 16:9. Each file gets the nearest one, with about as many pixels as height x
    width; none: every file is cropped to height x width."""
    shorter: tuple[int, ...] = ()
    """Smaller numbers of frames, for clips that are too short for frames."""
    clips_per_file: int = Field(1, ge=1)
    """At most how many clips to cut from a long video, one after another."""
    images: int = Field(0, ge=0)
    """How many images the demo draws."""
    clips: int = Field(0, ge=0)
    """How many clips the demo draws."""
    held_out: int = Field(64, ge=0)
    """How many images and how many clips are not trained on (at most a tenth of each), so that the
    discriminator and the motion can be measured on samples that no update sees."""

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
    """Euler steps of the base model."""
    guidance: float
    """Scale of classifier-free guidance."""
    shift_image: float = Field(gt=0)
    """Shift of the base model's sampling times, for images."""
    shift_video: float = Field(gt=0)
    """Shift of the base model's sampling times, for clips."""
    negative_prompt: str
    """The negative prompt of every guided sample."""
    second_time: float = Field(gt=0, lt=1)
    """Time of the second step when a model is sampled in two steps. Every file of the run states it."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample pictures that training writes; none: captions of the data."""

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
    """Stage 1: distillation into one step. Some settings are for one method only and begin with its name."""

    method: Literal["consistency", "dmd"] = "consistency"
    """consistency, which the paper uses, or dmd: distribution matching."""
    updates: int = Field(ge=1)
    """Number of updates."""
    batch_image: int = Field(ge=1)
    """Samples in an update on images."""
    batch_video: int = Field(ge=1)
    """Samples in an update on clips."""
    video_share: float = Field(ge=0, le=1)
    """Share of the updates that train on clips."""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam, or muon for models as small as the miniature."""
    lr: float = Field(gt=0)
    """Learning rate."""
    lr_end: float | None = Field(None, gt=0)
    """Where the learning rate ends; it falls from lr in a straight line. none: it stays at lr."""
    lr_warmup: int = Field(0, ge=0)
    """Updates at the start in which the learning rate rises to lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    steps: int = Field(ge=1)
    """consistency: into how many intervals the time between sample and noise is divided."""
    guidance: float = Field(ge=1)
    """Guidance scale of the teacher (for dmd, of the real score)."""
    fraction_at_final: float = Field(ge=0, le=1)
    """consistency: share of the samples that train on the last interval, the one that ends at pure noise."""
    target_decay: float = Field(ge=0, lt=1)
    """consistency: EMA decay of the target network; 0: the target is the student itself."""
    target_warmup: float = Field(0.0, ge=0)
    """consistency: like ema_warmup, for the target network."""
    ema_decay: float = Field(ge=0, lt=1)
    """Decay of the EMA (average of the weights) that becomes the result."""
    ema_warmup: float = Field(0.0, ge=0)
    """W: update n uses a decay of at most n / (n + W), so that a young EMA forgets the start sooner; 0:
    always the full decay."""
    fake_updates: int = Field(5, ge=1)
    """dmd: updates of the fake score for each update of the generator (DMD2: 5). The fake score is a LoRA of
    rank train.lora_rank."""
    lr_fake: float | None = Field(None, gt=0)
    """dmd: learning rate of the fake score. It rises and falls like that of the generator; none: lr."""
    t_min: float = Field(0.02, gt=0, le=1)
    """dmd: lowest time (least noise) at which samples are noised."""
    t_max: float = Field(0.98, gt=0, le=1, validate_default=True)
    """dmd: highest time (most noise) at which samples are noised."""
    t_shift: float | None = Field(None, gt=0)
    """dmd: shift of these times; none: the shift that the base is sampled with."""
    weighting: Weighting = "dmd"
    """dmd: either dmd, which makes all times count alike, or kl, the gradient of the divergence itself."""
    regression: float = Field(0.0, ge=0)
    """dmd: weight of the distance to the base's own sample from the same noise; 0: off."""
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

    With taps, discriminator_time, discriminator_start and train_backbone you can repeat what the paper tried
    and decided against (sections 3.3 and 5.2); their defaults are the paper's.
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
    """Learning rate of the discriminator's heads, which are new; none: lr_discriminator, as in the paper."""
    warmup: int = Field(0, ge=0)
    """Updates at the start that train only the discriminator."""
    ema_decay: float = Field(ge=0, lt=1)
    """Decay of the EMA (average of the weights) that becomes the result."""
    ema_warmup: float = Field(0.0, ge=0)
    """W: update n uses a decay of at most n / (n + W), so that a young EMA forgets the start sooner; 0:
    always the full decay, as in the paper."""
    shift: float = Field(gt=0)
    """s of equation 7: shift of the discriminator's timesteps."""
    relativistic: bool = False
    """true: a relativistic loss, which compares each real sample with a generated one; false: the paper's."""
    r1_weight: float = Field(ge=0)
    """Weight lambda of aR1, the approximated R1 penalty on real samples; 0: off."""
    r1_sigma: float = Field(gt=0)
    """Sigma of aR1's noise."""
    r1_sigma_time: float | None = Field(None, gt=0)
    """Sigma of the part of aR1's noise that differs between frames; r1_sigma is then that of the part that
    all frames share. none: r1_sigma is for both, as in the paper."""
    r2_weight: float = Field(0.0, ge=0)
    """Weight lambda of aR2, the same penalty on generated samples; 0: off."""
    r2_sigma: float = Field(0.01, gt=0)
    """Sigma of aR2's noise."""
    r2_sigma_time: float | None = Field(None, gt=0)
    """Like r1_sigma_time, for aR2."""
    reg_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the batch that the penalties are computed on."""
    centering: float = Field(0.0, ge=0)
    """Weight of a penalty that keeps the logits near 0, which a relativistic loss needs; 0: off."""
    discriminator_step: Literal["batched", "separate", "two_pass"] = "batched"
    """Three ways to the same gradients: batched is the fastest for few tokens, separate calls the network
    once per input, two_pass needs the least memory and one more forward pass."""
    taps: tuple[float, ...] = PAPER_FRACTIONS
    """Where the discriminator's heads sit, as fractions of the base's blocks. The discriminator ends at the
    last one."""
    discriminator_time: float | None = Field(None, ge=0, le=1)
    """One timestep from 0 to 1 for all samples; none: random ones, as in equation 6."""
    discriminator_start: Literal["base", "start"] = "base"
    """What the discriminator starts from: base, or start, the weights that the generator starts from."""
    train_backbone: bool = True
    """false: only the discriminator's heads are trained."""

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
    """The preset's other settings that the recipe changes, by full name (distill.guidance)."""


class Train(Settings):
    """How a run uses its machines, and what it writes. Only mode, the LoRA settings and head_width change the
    training; the others change nothing but rounding.
    """

    mode: Literal["full", "lora"] = "full"
    """full trains all weights; lora trains adapters on one frozen base that all networks share."""
    lora_rank: int = Field(64, ge=1)
    """Rank of the LoRA adapters."""
    lora_alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by lora_alpha / lora_rank; none: they are not scaled."""
    head_width: int | None = Field(None, ge=1)
    """Inner width of the discriminator's heads; none: the width of the model."""
    microbatch: int | None = Field(None, ge=1)
    """How many samples a process computes at once; none: its whole share of the batch."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products; weights and optimizer stay in fp32."""
    generator_zero: Literal[2, 3] = 3
    """ZeRO stage of the generator: 3 needs the least memory; 2 gathers the weights only once per update and
    keeps them, 2 bytes per parameter."""
    discriminator_zero: Literal[2, 3] = 3
    """The same for the discriminator."""
    sync_every_microbatch: bool = False
    """true: reduce gradients after every microbatch, if a whole fp32 gradient does not fit into memory;
    false: once per update."""
    checkpointing: Literal["none", "blocks", "offload"] = "none"
    """Activation checkpointing: blocks recomputes each block in the backward pass; offload does too, and
    keeps the blocks' inputs in the CPU's memory."""
    compile: str | None = None
    """Compile the blocks with this backend of torch.compile, such as inductor; none: do not."""
    context_parallel: int = Field(1, ge=1)
    """How many processes share the tokens of one sample."""
    attention: str = "auto"
    """Attention backend by diffusers' name; auto: the fastest installed one with a backward pass."""
    device: str = "auto"
    """auto, cpu or cuda; auto: the GPU if there is one."""
    ema_decays: tuple[float, ...] = ()
    """Decays of more EMAs to keep beside ema_decay's."""
    save_every: int = Field(50, ge=0)
    """Save a training state every so many updates; 0: never."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest training states to keep."""
    keep_best: int = Field(1, ge=0)
    """How many of the best training states to keep besides, whose samples are nearest to real latents."""
    judge_samples: int = Field(64, ge=0)
    """How many samples a training state is judged by; 0: none is judged."""
    sample_every: int = Field(0, ge=0)
    """Write sample pictures every so many updates; 0: never."""
    watch_every: int = Field(10, ge=0)
    """Measure the discriminator and the motion on held-out samples every so many updates; 0: never."""
    wandb: str | None = None
    """Weights & Biases project to report to; if the package wandb is installed."""
