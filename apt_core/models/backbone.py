"""What a backbone must offer to be trained, exported and sampled. A new one: CONTRIBUTING.md shows it in
full.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn


class TokenSplit(Protocol):
    """What the networks ask of a `context_parallel.Split`, where each method is described."""

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


@runtime_checkable
class Backbone(Protocol):
    """A velocity network over video latents that can also hand out the tokens of inner blocks. A torch
    module.

    config: its arguments; at least num_layers, num_attention_heads, attention_head_dim, in_channels,
    text_dim, patch_size.
    blocks: the transformer's, a ModuleList, each a module that is called alone, so that it can be
    checkpointed, sharded and streamed.
    output_head: names of submodules that only the velocity needs. text_only: layers of a block that only the
    text of the next one needs.
    official_name: a layer's name in the files that other programs read. image_conditioned: whether it takes
    images beside the text.
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
        """The velocity `[B, C, F, H, W]`; with `taps`, increasing block counts from 1, visual tokens `[B, S,
        d]` behind each of them.

        hidden_states: `[B, C, F, H, W]`; timestep: `[B]` in 0..1000, fp32; encoder_hidden_states: `[B, L,
        text_dim]`.
        """
        ...

    def use_attention(self, backend: str) -> None:
        """Sets the attention backend (`attention.best_backend`) of this model alone."""
        ...

    def fuse_projections(self) -> None:
        """Before inference: one product where several projections read the same tokens."""
        ...

    def share_tokens(self, split: TokenSplit) -> None:
        """Before training or inference on several processes: each keeps its piece of the tokens
        (`context_parallel.Split`).
        """
        ...

    def drop_output_head(self) -> None:
        """Removes `output_head`: the discriminator never uses it."""
        ...

    def keep_blocks(self, count: int) -> None:
        """Drops every block after the first `count`, and what then would have no gradient."""
        ...

    def enable_gradient_checkpointing(self, function: Callable | None = None) -> None:
        """Recomputes blocks in the backward pass."""
        ...

    def disable_gradient_checkpointing(self) -> None:
        """Keeps activations again."""
        ...


def as_backbone(model: nn.Module) -> Backbone:
    """The same object, seen as a backbone: of a module's own attributes torch only says Tensor or Module."""
    return cast(Backbone, model)
