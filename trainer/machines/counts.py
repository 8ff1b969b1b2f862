"""Parameters and FLOPs of a model and of an update, computed from a preset without touching a weight. A new
kind of backbone adds a class and an entry in COUNTS. tests/trainer/test_flops.py compares the FLOPs with what
the training functions really execute.

Notation: d width, L blocks, n visual tokens of one sample.

One multiplication in a matrix product counts as two FLOPs, because an addition comes with it. The backward
pass of a product takes the same again for the gradient of its input, and the same for that of the weights.
Attention does not store its scores; the backward pass recomputes them (in flash-attn, cuDNN and torch's fused
kernels), so it has five products where the forward pass has two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from apt_core.errors import AptError
from apt_core.models.wan import PAPER_FRACTIONS
from trainer.config import Adversarial, Model, Preset

TAPS = len(PAPER_FRACTIONS)
ATTENTION_BACK = 2.5


class Counts(Protocol):
    """What has to be known of a kind of backbone."""

    def block(self, model: Model) -> int:
        """Parameters of one block."""
        ...

    def idle(self, model: Model) -> int:
        """Parameters of a block that the last one does not have."""
        ...

    def outer(self, model: Model) -> int:
        """Parameters of the embedders and the output head, without the time embedder."""
        ...

    def head(self, model: Model) -> int:
        """Of those, what only the velocity needs: a discriminator does not have them."""
        ...

    def exact(self, model: Model) -> int:
        """Parameters, other than the time embedder's, that stay fp32 in a 16-bit base. They are not sharded:
        every GPU holds them all.
        """
        ...

    def adapter_widths(self, model: Model) -> int:
        """The widths of inputs and outputs of all linear layers of a block, added up: the parameters of a
        LoRA of rank 1 on them.
        """
        ...

    def forward(self, model: Model, n: int) -> tuple[float, float]:
        """FLOPs of the blocks in a forward pass of one sample: (linear layers, attention)."""
        ...

    def outer_forward(self, model: Model, n: int) -> float:
        """FLOPs of the embedders and the output head in that pass."""
        ...

    def adapters(self, model: Model, n: int, rank: int) -> float:
        """FLOPs that a LoRA of this rank on all linear layers of the blocks adds to that pass."""
        ...

    def frozen_text(self, model: Model) -> float:
        """FLOPs of those linear layers whose input is the embedded text itself. With a frozen text embedder,
        the gradient of that input is not computed.
        """
        ...


class WanCounts:
    """Counts of Wan: a block has self-attention, cross-attention, an FFN and a modulation table."""

    def block(self, model: Model) -> int:
        d = model.width
        attention = 4 * (d * d + d) + 2 * d
        return 2 * attention + 2 * d + 2 * d * model.ffn + model.ffn + d + 6 * d

    def idle(self, model: Model) -> int:
        return 0

    def outer(self, model: Model) -> int:
        d, patch = model.width, 4 * model.channels
        return (
            6 * (d * d + d) + model.text_dim * d + d + d * d + d + patch * d + d + d * patch + patch + 2 * d
        )

    def head(self, model: Model) -> int:
        return 4 * model.channels * (model.width + 1) + 2 * model.width

    def exact(self, model: Model) -> int:
        return model.layers * (6 + 2) * model.width + 2 * model.width

    def adapter_widths(self, model: Model) -> int:
        d = model.width
        return 8 * 2 * d + 2 * (d + model.ffn)

    def forward(self, model: Model, n: int) -> tuple[float, float]:
        d, text = model.width, model.text_length
        linear = model.layers * (n * (12.0 * d * d + 4.0 * d * model.ffn) + text * 4.0 * d * d)
        return linear, model.layers * 4.0 * d * (n * n + n * text)

    def outer_forward(self, model: Model, n: int) -> float:
        d, text = model.width, model.text_length
        return 2.0 * (
            text * (model.text_dim * d + d * d) + 256 * d + 7 * d * d + 2 * n * 4 * model.channels * d
        )

    def adapters(self, model: Model, n: int, rank: int) -> float:
        of_text = 4 * model.width  # keys and values of cross-attention
        visual = self.adapter_widths(model) - of_text
        return model.layers * 2.0 * rank * (n * visual + model.text_length * of_text)

    def frozen_text(self, model: Model) -> float:
        return model.layers * model.text_length * 4.0 * model.width**2


class MMDiTCounts:
    """Counts of the MMDiT: a block has two streams, visual and text. Each has q, k, v, out, an MLP of width
    4 d and a modulation of 6 d, and every token attends to all tokens of both.
    """

    def block(self, model: Model) -> int:
        d = model.width
        return 2 * (4 * (d * d + d) + 2 * 4 * d * d + 5 * d + 6 * (d * d + d)) + 4 * model.head_dim

    def idle(self, model: Model) -> int:
        d = model.width  # of the text: all but keys, values and their share of the modulation
        return 2 * (d * d + d) + 8 * d * d + 5 * d + 4 * (d * d + d) + model.head_dim

    def outer(self, model: Model) -> int:
        d, patch = model.width, 4 * model.channels
        return model.text_dim * d + d + model.text_dim + patch * d + d + 2 * (d * d + d) + d * patch + patch

    def head(self, model: Model) -> int:
        d = model.width
        return 4 * model.channels * (d + 1) + 2 * (d * d + d)

    def exact(self, model: Model) -> int:
        return 0

    def adapter_widths(self, model: Model) -> int:
        return 48 * model.width

    def forward(self, model: Model, n: int) -> tuple[float, float]:
        d, every = model.width, n + model.text_length
        return model.layers * every * 24.0 * d * d, model.layers * every**2 * 4.0 * d

    def outer_forward(self, model: Model, n: int) -> float:
        d = model.width
        return 2.0 * (
            model.text_length * model.text_dim * d + 256 * d + d * d + 2 * n * 4 * model.channels * d
        )

    def adapters(self, model: Model, n: int, rank: int) -> float:
        return model.layers * 2.0 * rank * (n + model.text_length) * 18.0 * model.width

    def frozen_text(self, model: Model) -> float:
        return 0.0  # the text goes on through the blocks


COUNTS: dict[str, Counts] = {"wan": WanCounts(), "mmdit": MMDiTCounts()}


def counts_of(model: Model) -> Counts:
    """The counts of this model's kind of backbone. Raises AptError for a kind that has none."""
    if model.kind not in COUNTS:
        raise AptError(
            f"there are no parameter and FLOP counts for a {model.kind}: add them to "
            "trainer.machines.counts.COUNTS."
        )
    return COUNTS[model.kind]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a transformer and of the adapters on it.

    body: the whole transformer; block: one block; outer: what is outside the blocks, the embedders and the
    output head; output: of that, what only the velocity needs, so a discriminator does not have it.
    time: the time embedder, which is fp32 whatever the dtype of the rest; exact: what else stays fp32 in a
    16-bit base, whole on every GPU.
    adapter: one LoRA on all linear layers of the blocks.
    """

    body: int
    block: int
    outer: int
    output: int
    time: int
    exact: int
    adapter: int


def sizes_of(model: Model, rank: int = 0) -> Sizes:
    """The sizes of this model, with a LoRA of this rank. Raises AptError as `counts_of` does."""
    counts, d = counts_of(model), model.width
    time = 256 * d + d + d * d + d
    block, outer = counts.block(model), time + counts.outer(model)
    return Sizes(
        body=model.layers * block - counts.idle(model) + outer,
        block=block,
        outer=outer,
        output=counts.head(model),
        time=time,
        exact=counts.exact(model),
        adapter=model.layers * rank * counts.adapter_widths(model),
    )


def head_parameters(model: Model, inner: int, taps: int = TAPS) -> int:
    """Parameters of the discriminator's heads, the last norm and the logit. inner: width of their attention;
    taps: how many heads there are.
    """
    d = model.width
    head = 4 * d + 4 * d * inner + 3 * inner + d + 2 * model.head_dim + 8 * d * inner + 4 * inner + d
    return taps * head + 3 * taps * d + 1


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
    linear, attention = counts.forward(model, n)
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


def adversarial_flops(
    preset: Preset, settings: Adversarial, n: int, taps: Sequence[int]
) -> tuple[float, float]:
    """FLOPs of one sample of n tokens in a phase: (the discriminator's step, the generator's step).

    settings: the phase's; taps: the blocks behind which the heads sit (apt_core.models.wan.tap_blocks).
    """
    model, lora = preset.model, preset.train.mode == "lora"
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


def distill_flops(preset: Preset, n: int) -> float:
    """FLOPs of one sample of n tokens in stage 1.

    Consistency: teacher, target and student. dmd: the updates of the fake score, each with a sample of the
    generator; then the generator, both scores of its sample, and the base's own sample if there is a
    regression to it.
    """
    lora, settings = preset.train.mode == "lora", preset.distill
    student = cost(preset, n, lora)
    teacher = cost(preset, n, False).forward * (1 if settings.guidance == 1 else 2)
    if settings.method == "consistency":
        return teacher + student.forward + student.trained
    fake = cost(preset, n, True)
    sample = (settings.regression_steps or preset.sampling.steps) * teacher if settings.regression else 0.0
    of_generator = student.trained + teacher + fake.forward + sample
    return settings.fake_updates * (student.forward + fake.trained) + of_generator
