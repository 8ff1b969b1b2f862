"""Parameters and FLOPs of each kind of backbone, computed from a preset's `model` section. A new kind adds a
class and an entry in COUNTS.

Notation: d width, L blocks, n visual tokens of one sample. One multiplication in a matrix product counts as
two FLOPs, because an addition comes with it.
"""

from typing import Protocol

from apt_core.errors import AptError
from trainer.config import Model


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
