"""What a backbone must offer so that it can be trained, exported and sampled. CONTRIBUTING.md shows a
complete new one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn


class TokenSplit(Protocol):
    """The part of `context_parallel.Split` that the networks call; the methods are described there."""

    local_taps: bool

    def processor(self, backend: str | None) -> Any: ...

    def piece(self, x: Tensor) -> Tensor: ...

    def whole(self, x: Tensor, n: int) -> Tensor: ...

    def tap(self, tokens: Tensor, n: int) -> Tensor: ...

    def embed(self, embedding: nn.Conv3d, latents: Tensor) -> Tensor: ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor: ...

    def merge(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def cut(self, x: Tensor) -> Tensor: ...


class Backbone(Protocol):
    """A torch module that predicts a velocity over video latents, and can also return the tokens of inner
    blocks.

    config: the arguments it was built with; at least num_layers, num_attention_heads, attention_head_dim,
    in_channels, text_dim, patch_size.
    blocks: the transformer's blocks in a ModuleList. Each is called as a module of its own, so that it can be
    checkpointed, sharded and streamed.
    output_head: names of the submodules that only the velocity needs. text_only: layers of a block that only
    serve the text of the next block.
    official_name: maps a layer's name to its name in the files that other programs read. image_conditioned:
    whether it takes images besides the text.
    """

    config: Any
    blocks: nn.ModuleList
    patch_embedding: nn.Conv3d
    output_head: Sequence[str]
    text_only: Sequence[str]
    official_name: Callable[[str], str]
    image_conditioned: bool

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        taps: Sequence[int] | None = None,
    ) -> Any:
        """Returns the velocity `[B, C, F, H, W]`, or with `taps` (increasing block counts from 1) the visual
        tokens `[B, S, d]` after each of these blocks.

        hidden_states: `[B, C, F, H, W]`; timestep: `[B]` in 0..1000, fp32; encoder_hidden_states: `[B, L,
        text_dim]`.
        """
        ...

    def use_attention(self, backend: str) -> None:
        """Set the attention backend (`attention.best_backend`) of this model alone."""
        ...

    def fuse_projections(self) -> None:
        """Before inference: merge projections that read the same tokens into one matrix product."""
        ...

    def share_tokens(self, split: TokenSplit) -> None:
        """Before training or inference on several processes: let each process keep only its piece of the
        tokens (`context_parallel.Split`).
        """
        ...

    def drop_output_head(self) -> None:
        """Remove `output_head`, which the discriminator never uses."""
        ...

    def keep_blocks(self, count: int) -> None:
        """Remove every block after the first `count`, and what would then get no gradient."""
        ...

    def enable_gradient_checkpointing(self, function: Callable | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        ...

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        ...


def as_backbone(model: nn.Module) -> Backbone:
    """The same object with the type Backbone; torch types a module's attributes only as Tensor or Module."""
    return cast(Backbone, model)
