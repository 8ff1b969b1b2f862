"""The discriminator (3.3, fig. 1): the base transformer, with cross-attention heads that read its tokens at
several depths, and one logit.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import AptError
from ..models.backbone import TokenSplit, as_backbone
from ..models.wan import PAPER_FRACTIONS, tap_blocks


class CrossAttentionHead(nn.Module):
    """One learnable token that attends to all visual tokens of one depth and summarises them (fig. 1).

    token + attention(query = RMSNorm(token), keys and values = RMSNorm(tokens)), with RMSNorm on Q and K;
    then + MLP(RMSNorm(.)).
    The paper leaves these open, and we chose: QK norm per attention head (as in MMDiT), linear layers with
    biases (as in Wan's attention), an MLP four times as wide as the attention, and a token that starts at
    std 0.02.

    dim: width of the backbone and of the token; num_heads: number of attention heads; inner_dim: width of the
    attention, by default `dim` (at 14B three heads of full width have 0.9 billion parameters; 1024 keeps them
    small). Raises AptError when num_heads does not divide the attention's width.
    """

    split: TokenSplit | None = None
    """How context_parallel.enable has split the tokens; None while every process has all of them."""

    def __init__(
        self, dim: int, num_heads: int, inner_dim: int | None = None, mlp_ratio: int = 4, eps: float = 1e-6
    ):
        super().__init__()
        inner_dim = inner_dim or dim
        if num_heads < 1 or inner_dim % num_heads:
            raise AptError(
                f"{num_heads} attention heads do not divide the width {inner_dim} of a discriminator head."
            )
        self.num_heads = num_heads
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.norm_token = nn.RMSNorm(dim, eps)
        self.norm_visual = nn.RMSNorm(dim, eps)
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.norm_q = nn.RMSNorm(inner_dim // num_heads, eps)
        self.norm_k = nn.RMSNorm(inner_dim // num_heads, eps)
        self.to_out = nn.Linear(inner_dim, dim)
        self.norm_mlp = nn.RMSNorm(dim, eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * inner_dim), nn.GELU(), nn.Linear(mlp_ratio * inner_dim, dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: visual tokens [B, S, dim] of one depth, or this process's share of them under context
        parallelism. Returns one token per sample, [B, dim].
        """
        token, q, k, v = self._ask(tokens)
        answer = F.scaled_dot_product_attention(q, k, v) if self.split is None else self.split.merge(q, k, v)
        token = token + self.to_out(rearrange(answer, "b h n c -> b n (h c)"))
        token = token + self.mlp(self.norm_mlp(token))
        return token[:, 0].clone()  # not a view: FSDP2 hooks what its modules return

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> Tensor:
        """Where the token looks: softmax weights over the visual tokens [B, S, dim], as fp32 [B, heads, S],
        which sum to 1 over S.

        Raises AptError under context parallelism, where no process holds all tokens.
        """
        if self.split is not None:
            raise AptError(
                "a discriminator head under context parallelism sees only its own tokens: "
                "ask it for its weights on one process."
            )
        _, q, k, _ = self._ask(tokens)
        return (q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)[:, :, 0]

    def _ask(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = self.norm_visual(tokens.to(self.token.dtype))
        token = self.token.expand(tokens.shape[0], -1, -1)
        q = self.norm_q(self._split(self.to_q(self.norm_token(token))))  # [B, heads, 1, inner / heads]
        k = self.norm_k(self._split(self.to_k(tokens)))  # [B, heads, S, inner / heads]
        return token, q, k, self._split(self.to_v(tokens))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h c) -> b h n c", h=self.num_heads)


class Discriminator(nn.Module):
    """`D_hat(x, t, c)` of eq. 6: turns raw latents, real or generated and never noised, into one logit.

    backbone: a WanBackbone, an MMDiTBackbone or a role of one (lora.py), with the ORIGINAL base weights
    (3.3). The discriminator takes it over: it removes the output head and the blocks after the last tap, so
    that every parameter gets a gradient.
    fractions: the depths of the taps; num_heads, inner_dim: of the heads, by default those of the backbone.
    Raises AptError for a backbone that is too shallow for the taps or is made for image conditions.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fractions: Sequence[float] = PAPER_FRACTIONS,
        num_heads: int | None = None,
        inner_dim: int | None = None,
    ):
        super().__init__()
        below = as_backbone(backbone)
        config = below.config
        if below.image_conditioned:
            raise AptError(
                "the discriminator needs a text-to-video backbone; this one has image conditions (image_dim)."
            )
        self.taps = tap_blocks(config.num_layers, fractions)
        below.drop_output_head()
        if self.taps[-1] < config.num_layers:
            below.keep_blocks(self.taps[-1])
        self.backbone = backbone
        dim = config.num_attention_heads * config.attention_head_dim
        heads = num_heads or config.num_attention_heads
        self.heads = nn.ModuleList(CrossAttentionHead(dim, heads, inner_dim) for _ in self.taps)
        self.norm = nn.LayerNorm(dim * len(self.taps))
        self.logit = nn.Linear(dim * len(self.taps), 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x: clean latents [B, C, F, H, W], real or generated; t: [B] in [0, 1]; text: [B, L, text_dim].
        Returns logits [B], fp32.

        Eq. 6 takes the mean over t. Here the caller draws one t per sample, `shift(U(0, 1), s)`, and uses the
        same one for the real, fake and perturbed sample. With t = 0 training collapses (3.3).
        """
        features = self.backbone(x, 1000.0 * t.float(), text, taps=self.taps)
        summary = torch.cat([head(f) for head, f in zip(self.heads, features)], dim=1)
        # fp32 to the end: aR1 is the difference of two nearly equal logits, which bf16 would round away.
        with torch.autocast(summary.device.type, enabled=False):
            norm, logit = self.norm, self.logit
            summary = F.layer_norm(
                summary.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
            )
            # not a view: FSDP2 hooks its outputs
            return summary @ logit.weight.float()[0] + logit.bias.float()

    @torch.no_grad()
    def weights(self, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """Where each head looks: the `CrossAttentionHead.weights` of each depth, [B, heads, S], with S in the
        order (frame, row, column) of the patches.

        x, t, text: as in `forward`. Raises AptError as the heads do.
        """
        features = self.backbone(x, 1000.0 * t.float(), text, taps=self.taps)
        return [head.weights(f) for head, f in zip(cast(Iterable[CrossAttentionHead], self.heads), features)]

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each backbone block in the backward pass instead of keeping its activations."""
        as_backbone(self.backbone).enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keeps activations again."""
        as_backbone(self.backbone).disable_gradient_checkpointing()
