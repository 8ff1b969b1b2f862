"""Wan's transformer as generator and as the discriminator's backbone: taps, early stop, and fp32 times."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from ..errors import AptError
from ..files import keys
from .backbone import TokenSplit
from .patches import from_patches

PAPER_FRACTIONS = (4 / 9, 13 / 18, 1.0)
"""Blocks 16, 26 and 36 of 36 (3.3) as shares of the depth."""


def tap_blocks(num_layers: int, fractions: Sequence[float] = PAPER_FRACTIONS) -> tuple[int, ...]:
    """The numbers of blocks (from 1) after which the discriminator reads tokens: (16, 26, 36) of 36 blocks,
    (13, 22, 30) of Wan's 30.

    Raises AptError when a fraction is outside (0, 1], when they do not increase, or when the model has too
    few blocks to keep them apart.
    """
    if (
        not fractions
        or not all(0 < f <= 1 for f in fractions)
        or any(a >= b for a, b in zip(fractions, fractions[1:]))
    ):
        raise AptError(f"tap fractions must increase within (0, 1], got {tuple(fractions)}.")
    blocks = tuple(math.floor(f * num_layers + 0.5) for f in fractions)
    if blocks[0] < 1 or len(set(blocks)) < len(blocks):
        raise AptError(
            f"a model of {num_layers} blocks is too shallow for taps at {tuple(fractions)}: "
            f"they fall on blocks {blocks}."
        )
    return blocks


def check_taps(taps: Sequence[int], num_layers: int) -> int:
    """Check that the taps, which are 1-based block counts, increase and lie within the model's blocks; return
    the last one. Raises AptError otherwise.
    """
    taps = tuple(taps)
    if not taps or taps[0] < 1 or taps[-1] > num_layers or any(a >= b for a, b in zip(taps, taps[1:])):
        raise AptError(f"taps must increase within 1 to {num_layers}, the number of blocks, got {taps}.")
    return taps[-1]


class WanBackbone(WanTransformer3DModel):
    """diffusers' Wan transformer with the same weights and config, which can also return the tokens of inner
    blocks.
    """

    output_head = ("proj_out", "norm_out", "scale_shift_table")
    """Submodules that only the velocity needs."""
    text_only = ()
    """Layers of a block that only serve the text of the next block: none, since Wan's blocks share one
    text.
    """
    official_name = staticmethod(keys.transformer_to_official)
    """Maps a layer's name to its name in the files that other programs read."""
    config: Any  # diffusers types it as a dict; it also has the arguments as attributes
    _gradient_checkpointing_func: Callable  # diffusers sets it together with gradient_checkpointing
    split: TokenSplit | None = None
    """How context_parallel.enable has split the tokens; None while every process has all of them."""

    @property
    def image_conditioned(self) -> bool:
        """Whether the model takes images besides the text."""
        return self.config.image_dim is not None or self.config.added_kv_proj_dim is not None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        taps: Sequence[int] | None = None,
    ):
        """The stock forward pass, or with `taps` the tokens of inner blocks.

        hidden_states: [B, C, F, H, W] latents; timestep: [B] in 0..1000, kept in fp32; encoder_hidden_states:
        [B, L, text_dim].
        Latents and text are cast to the weights' dtype inside this function, because FSDP2's mixed precision
        casts the weights just before it.

        taps: increasing 1-based block counts. Returns a list of visual tokens [B, S, d], S = F H W / patch
        volume, each as its block returns it (without a norm), and runs no block after the last tap. Without
        taps the result equals the stock forward's, bit for bit.
        Raises AptError for taps outside the model, for a velocity after drop_output_head, and, with taps or
        under context parallelism, for any input besides text and one time per sample.
        """
        dtype = self.patch_embedding.weight.dtype
        hidden_states, encoder_hidden_states = hidden_states.to(dtype), encoder_hidden_states.to(dtype)
        if taps is None and self.proj_out is None:
            raise AptError(
                "this backbone has no output head any more (drop_output_head): "
                "it can only be called with taps."
            )
        if taps is None and self.split is None:
            return super().forward(
                hidden_states,
                timestep,  # pyright: ignore[reportArgumentType] - diffusers says long, and takes fp32
                encoder_hidden_states,
                encoder_hidden_states_image,
                return_dict,
                attention_kwargs=attention_kwargs,
            )
        if encoder_hidden_states_image is not None or attention_kwargs or timestep.ndim != 1:
            raise AptError(
                "taps and context parallelism take text and one time per sample only, "
                "no image embeddings and no attention_kwargs."
            )
        time, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))  # [B, 6, d]
        count = math.prod(hidden_states.shape[2:]) // math.prod(self.config.patch_size)
        if taps is not None:
            features = self._tokens(hidden_states, modulation, text, tuple(taps))
            return features if self.split is None else [self.split.tap(tokens, count) for tokens in features]
        [tokens] = self._tokens(hidden_states, modulation, text, (len(self.blocks),))
        patches = self._head(tokens, time)
        whole = patches if self.split is None else self.split.whole(patches, count)
        velocity = from_patches(whole, self.config.patch_size, hidden_states.shape[2:], channels_last=True)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _tokens(
        self, latents: Tensor, modulation: Tensor, text: Tensor, taps: tuple[int, ...]
    ) -> list[Tensor]:
        """The visual tokens after each tap; under context parallelism, this process's piece of them."""
        last = check_taps(taps, len(self.blocks))
        rotary = self.rope(latents)
        if self.split is None:
            tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, S, d]
        else:
            tokens = self.split.embed(self.patch_embedding, latents)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        out = []
        for count, block in enumerate(self.blocks[:last], start=1):
            if checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, text, modulation, rotary)
            else:
                tokens = block(tokens, text, modulation, rotary)
            if count in taps:
                out.append(tokens)
        return out

    def _own_blocks(self) -> list[Any]:
        """The WanTransformerBlocks; diffusers gives the type of their processors nowhere."""
        return list(self.blocks)

    def _head(self, tokens: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        return self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))

    def use_attention(self, backend: str) -> None:
        """Set the attention backend (attention.best_backend) of this model alone; diffusers'
        set_attention_backend would change the whole process.
        """
        for block in self._own_blocks():
            block.attn1.processor._attention_backend = block.attn2.processor._attention_backend = backend

    def fuse_projections(self) -> None:
        """Compute queries, keys and values that read the same tokens with one matrix product. The merged
        weights replace the three.
        """
        for block in self._own_blocks():
            for attention in (block.attn1, block.attn2):
                attention.fuse_projections()
                fused = ("to_k", "to_v") if attention.is_cross_attention else ("to_k", "to_v", "to_q")
                for name in fused:
                    setattr(attention, name, None)

    def share_tokens(self, split: TokenSplit) -> None:
        """Compute over the processes of a `context_parallel.Split`."""
        self.split = split
        for block in self._own_blocks():
            block.attn1.set_processor(split.processor(block.attn1.processor._attention_backend))

    def drop_output_head(self) -> None:
        """Remove proj_out, norm_out and scale_shift_table, which the discriminator never uses.

        They would get no gradient and thus no optimizer state, and a sharded optimizer refuses to resume when
        state is missing.
        """
        for name in self.output_head:
            setattr(self, name, None)

    def keep_blocks(self, count: int) -> None:
        """Remove every block after the first `count`, so that a discriminator of less than full depth (5.2)
        has no unused parameters.
        """
        self.blocks = self.blocks[:count]
        self.register_to_config(num_layers=count)


def predict_velocity(model, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """`v(x_t, c, t)` in fp32, [B, C, F, H, W] like `x_t`.

    model: a WanBackbone, or any network that is called like one; t: [B] in [0, 1]; text: [B, L, text_dim].
    The network gets `1000 t` in fp32 whatever its own dtype, because bf16 would turn 701 into 700. Raises
    AptError when `t` is not one value per sample.
    """
    if t.shape != x_t.shape[:1]:
        raise AptError(
            f"time has shape {tuple(t.shape)}, but a batch of {x_t.shape[0]} needs shape ({x_t.shape[0]},)."
        )
    output = model(
        hidden_states=x_t, timestep=1000.0 * t.float(), encoder_hidden_states=text, return_dict=False
    )
    return output[0].float()
