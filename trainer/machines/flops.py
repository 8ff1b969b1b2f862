"""FLOPs of an update, computed from the preset alone. tests/trainer/test_flops.py compares them with what the
training functions really execute.

One multiplication in a matrix product counts as two FLOPs. The backward pass of a product takes the same
again for the gradient of its input, and the same for that of the weights. Attention does not store its
scores; the backward pass recomputes them (in flash-attn, cuDNN and torch's fused kernels), so it has five
products where the forward pass has two.
"""

from dataclasses import dataclass

from apt_core.models.wan import tap_blocks
from trainer.config import Model, Preset
from trainer.machines.counts import counts_of

ATTENTION_BACK = 2.5


@dataclass(frozen=True)
class Cost:
    """FLOPs of one network for one sample.

    forward: the forward pass.
    again: its recomputation from activation checkpoints.
    back: the backward pass to the weights that are trained.
    through: the backward pass to the input only.
    """

    forward: float
    again: float
    back: float
    through: float

    @property
    def trained(self) -> float:
        """The forward pass, the recomputation, and the backward pass to the weights."""
        return self.forward + self.again + self.back

    @property
    def judged(self) -> float:
        """The forward pass, the recomputation, and the backward pass to the input."""
        return self.forward + self.again + self.through


def tokens(preset: Preset, kind: str) -> int:
    """Visual tokens of one sample: its latents in patches of 1 x 2 x 2. kind: "image", or "video"."""
    (height, width), (t, down, across) = preset.data.size(kind), preset.model.stride
    frames = preset.data.frames if kind == "video" else 1
    return ((frames - 1) // t + 1) * (height // (2 * down)) * (width // (2 * across))


def forward_flops(model: Model, n: int) -> tuple[float, float]:
    """FLOPs of the blocks in a forward pass of one sample of n tokens: (linear layers, attention)."""
    return counts_of(model).forward(model, n)


def cost(
    preset: Preset, n: int, adapted: bool, depth: float = 1.0, heads: float = 0.0, backbone: bool = True
) -> Cost:
    """The cost of one network over n tokens.

    adapted: the network has LoRA adapters, and only those are trained.
    depth: the share of the blocks that is used.
    heads: FLOPs of the discriminator's heads in a forward pass.
    backbone: whether the backbone is trained, or only the heads.
    """
    model, counts, train = preset.model, counts_of(preset.model), preset.train
    linear, attention = forward_flops(model, n)
    adapters = counts.adapters(model, n, train.lora_rank) if adapted else 0.0
    outer, text = counts.outer_forward(model, n), counts.frozen_text(model)
    blocks = depth * (linear + attention + adapters)
    to_input = depth * (linear - text + ATTENTION_BACK * attention + adapters)
    if not backbone:
        back = heads  # to the weights of the heads; nothing before them is trained
    elif adapted:
        back = to_input + depth * adapters + 2 * heads
    else:
        back = depth * (2 * linear + ATTENTION_BACK * attention) + outer + 2 * heads
    again = 0.0 if train.checkpointing == "none" else blocks
    return Cost(blocks + outer + heads, again, back, to_input + heads)


def adversarial_flops(preset: Preset, stage: str, recipe: str) -> tuple[float, float]:
    """FLOPs of one sample in a phase of stage 2: (the discriminator's step, the generator's step)."""
    settings, model = preset.phase(stage, recipe), preset.model
    n, lora = tokens(preset, stage), preset.train.mode == "lora"
    taps = tap_blocks(model.layers, settings.taps)
    heads = len(taps) * 4.0 * n * (preset.train.head_width or model.width) * (model.width + 1)
    generator = cost(preset, n, lora)
    judge = cost(preset, n, lora, taps[-1] / model.layers, heads, settings.train_backbone)
    penalties = (settings.r1_weight > 0) + (settings.r2_weight > 0)
    passes = 2 + penalties * settings.reg_fraction
    first = judge.forward if settings.discriminator_step == "two_pass" else 0.0
    again = judge.again if settings.train_backbone else 0.0
    of_discriminator = generator.forward + passes * (first + judge.forward + again + judge.back)
    of_generator = generator.trained + judge.judged + settings.relativistic * judge.forward
    return of_discriminator, of_generator


def distill_flops(preset: Preset, kind: str) -> float:
    """FLOPs of one sample of stage 1.

    Consistency: teacher, target and student. dmd: the updates of the fake score, each with a sample of the
    generator; then the generator, both scores of its sample, and the base's own sample if there is a
    regression to it.
    """
    n, lora, settings = tokens(preset, kind), preset.train.mode == "lora", preset.distill
    student = cost(preset, n, lora)
    teacher = cost(preset, n, False).forward * (1 if settings.guidance == 1 else 2)
    if settings.method == "consistency":
        return teacher + student.forward + student.trained
    fake = cost(preset, n, True)
    sample = (settings.regression_steps or preset.sampling.steps) * teacher if settings.regression else 0.0
    of_generator = student.trained + teacher + fake.forward + sample
    return settings.fake_updates * (student.forward + fake.trained) + of_generator
