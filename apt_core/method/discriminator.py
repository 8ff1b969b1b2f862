"""The discriminator (3.3, fig. 1): the base transformer, read at several depths by cross-attention heads, one
logit.
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
    """One learnable token asks all visual tokens of one depth, and comes out as their summary (fig. 1).

    token + attention(query = RMSNorm(token), keys and values = RMSNorm(tokens)), with RMSNorm on Q and K;
    then + MLP(RMSNorm(.)).
    Left open by the paper, chosen here: the QK norm is per attention head (as in MMDiT), linear layers have
    biases (as in Wan's own attention), the MLP is four times as wide as the attention, the token starts at
    std 0.02.

    dim: width of the backbone and of the token; num_heads: attention heads; inner_dim: width of the
    attention, `dim` unless given (at 14B three heads of full width are 0.9 billion parameters; 1024 makes
    them slim). Raises AptError when heads do not divide it.
    """

    split: TokenSplit | None = None
    """Where context_parallel.enable has put the tokens: in pieces on a group of processes."""

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
        """tokens: visual tokens [B, S, dim] of one depth; with a split, this process's share of them. Returns
        one token per sample, [B, dim].
        """
        token, q, k, v = self._ask(tokens)
        answer = F.scaled_dot_product_attention(q, k, v) if self.split is None else self.split.merge(q, k, v)
        token = token + self.to_out(rearrange(answer, "b h n c -> b n (h c)"))
        token = token + self.mlp(self.norm_mlp(token))
        return token[:, 0].clone()  # not a view: FSDP2 hooks what its modules return

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> Tensor:
        """Where the token looks: softmax weights over the visual tokens [B, S, dim], [B, heads, S] in fp32,
        which sum to 1 over S.

        Raises AptError where a split holds the tokens in pieces, over which no one process can sum.
        """
        if self.split is not None:
            raise AptError(
                "a discriminator head under context parallelism sees only its own tokens: ask it for its weights on one process."
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
    """`D_hat(x, t, c)` of eq. 6: raw latents, real or generated, never noised, to one logit.

    backbone: a WanBackbone, an MMDiTBackbone or a role of one (lora.py), with the ORIGINAL base weights
    (3.3). It is taken over: its output head and the blocks after the last tap are removed, so that every
    parameter of the discriminator gets a gradient.
    fractions: depths of the taps; num_heads, inner_dim: of the heads, the backbone's own unless given.
    Raises AptError for backbones too shallow for the taps or made for image conditions.
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

        The mean over t in eq. 6 is one t per sample, `shift(U(0, 1), s)`, drawn by the caller: real, fake and
        perturbed samples must share it. t = 0 collapses (3.3).
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
        """Where each head looks, `CrossAttentionHead.weights` by depth: [B, heads, S] each, S in the order
        (frame, row, column) of the patches.

        x, t, text: as for the forward. Raises AptError as the heads do.
        """
        features = self.backbone(x, 1000.0 * t.float(), text, taps=self.taps)
        return [head.weights(f) for head, f in zip(cast(Iterable[CrossAttentionHead], self.heads), features)]

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each backbone block in the backward pass instead of keeping its activations."""
        as_backbone(self.backbone).enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keeps activations again."""
        as_backbone(self.backbone).disable_gradient_checkpointing()
