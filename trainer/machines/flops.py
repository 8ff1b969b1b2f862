"""FLOPs of an update, counted from the preset alone; tests/trainer/test_flops.py holds them against the real
functions.

A product of matrices takes two FLOPs per multiplication, its backward pass as many for the inputs and as many
for the weights. Attention keeps no scores: its backward pass computes them again (flash-attn, cuDNN and
torch's fused kernels alike), which makes five products of the forward's two.
"""

from dataclasses import dataclass

from apt_core.models.wan import tap_blocks
from trainer.config import Model, Preset
from trainer.machines.counts import counts_of

ATTENTION_BACK = 2.5


@dataclass(frozen=True)
class Cost:
    """One network and one sample, in FLOPs. forward: a pass; again: its recomputation from checkpoints; back:
    the backward pass for the weights that are trained; through: the one for the input alone.
    """

    forward: float
    again: float
    back: float
    through: float

    @property
    def trained(self) -> float:
        """Forward, recomputation, and backward pass for the weights."""
        return self.forward + self.again + self.back

    @property
    def judged(self) -> float:
        """Forward, recomputation, and backward pass for the input."""
        return self.forward + self.again + self.through


def tokens(preset: Preset, kind: str) -> int:
    """Of one sample: latents in patches of 1 x 2 x 2."""
    (height, width), (t, down, across) = preset.data.size(kind), preset.model.stride
    frames = preset.data.frames if kind == "video" else 1
    return ((frames - 1) // t + 1) * (height // (2 * down)) * (width // (2 * across))


def forward_flops(model: Model, n: int) -> tuple[float, float]:
    """(linear layers, attention) of one forward pass of one sample of n tokens."""
    return counts_of(model).forward(model, n)


def cost(
    preset: Preset, n: int, adapted: bool, depth: float = 1.0, heads: float = 0.0, backbone: bool = True
) -> Cost:
    """Of a network over n tokens. adapted: with adapters, which then alone are trained; depth: share of the
    blocks; heads: FLOPs of the discriminator's heads in a forward pass; backbone: whether it is trained, not
    only the heads.
    """
    model, counts, train = preset.model, counts_of(preset.model), preset.train
    linear, attention = forward_flops(model, n)
    adapters = counts.adapters(model, n, train.lora_rank) if adapted else 0.0
    outer, text = counts.outer_forward(model, n), counts.frozen_text(model)
    blocks = depth * (linear + attention + adapters)
    to_input = depth * (linear - text + ATTENTION_BACK * attention + adapters)
    if not backbone:
        back = heads  # for the heads' weights, and for nothing before them
    elif adapted:
        back = to_input + depth * adapters + 2 * heads
    else:
        back = depth * (2 * linear + ATTENTION_BACK * attention) + outer + 2 * heads
    again = 0.0 if train.checkpointing == "none" else blocks
    return Cost(blocks + outer + heads, again, back, to_input + heads)


def adversarial_flops(preset: Preset, stage: str, variant: str) -> tuple[float, float]:
    """Of one sample in (the discriminator's step, the generator's step) of a phase of stage 2."""
    settings, model = getattr(preset.phases(variant), stage), preset.model
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
    """Of one sample of stage 1. By consistency: teacher, target and student. By dmd: the fake score's updates,
    each with a sample of the generator; then the generator, both scores of its sample, and the base's own
    sample where there is a regression to it.
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
