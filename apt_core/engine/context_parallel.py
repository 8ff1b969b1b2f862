"""Context parallelism: split the tokens of one sample over a group of processes, exactly, with correct
gradients for both networks.

    enable(generator, group)
    enable(discriminator, group)

All processes of the group pass the same inputs and get the same whole outputs. In between, each holds one
piece of the tokens. For self-attention each process gets all tokens for a part of the heads (Ulysses,
DeepSpeed 2023). In a discriminator head each process attends to its own piece, and the results are merged.

Gradients. Every process computes the same loss from the whole output. Whole tensors have their true gradient
on every process, also the network's input, since the generator step needs dD/dx. A weight that only met one
piece of the tokens has its share of the gradient times the group size, so that the MEAN over the group is the
true gradient. DDP and FSDP2 average over all their processes. Over (data parallel x context parallel)
processes they thus give the same as one process, without a change to the loss. Without DDP or FSDP2, average
the group's gradients yourself. Inputs other than the latents (time, text) get partial gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..errors import AptError
from ..method.discriminator import CrossAttentionHead, Discriminator
from ..models.attention import attend
from ..models.backbone import as_backbone
from ..models.lora import Role
from ..models.mmdit import rotate
from ..models.patches import to_patches


def enable(model: nn.Module, group: ProcessGroup) -> None:
    """Let a Backbone, a role of one, or a Discriminator compute over the group's processes, in place.

    Weights, state dict and interface stay the same. Call this before compilation. The tokens of taps come out
    whole, except when a discriminator passes them to its heads. Any number of tokens works; raises AptError
    when the group size does not divide the attention heads.
    """
    backbone = model.backbone if isinstance(model, Discriminator) else model
    backbone = as_backbone(backbone.base if isinstance(backbone, Role) else backbone)
    heads, size = backbone.config.num_attention_heads, group.size()
    if heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise AptError(
            f"{heads} attention heads cannot be split over {size} context-parallel processes: "
            f"use one of {fitting}."
        )
    split = Split(group)
    backbone.share_tokens(split)
    if isinstance(model, Discriminator):
        split.local_taps = True
        for head in cast(Iterable[CrossAttentionHead], model.heads):
            head.split = split


class Split:
    """How the processes of a group share a sequence. It is cut into as many equal pieces as there are
    processes, with zeros at the end where it does not divide, and process r has piece r.
    """

    def __init__(self, group: ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.local_taps = False

    def processor(self, backend: str | None) -> "UlyssesProcessor":
        """The processor that diffusers' attention layers need for this."""
        return UlyssesProcessor(self, backend)

    def __deepcopy__(self, memo) -> "Split":
        return self  # copies of a model share its group

    def piece(self, x: Tensor) -> Tensor:
        """Cut the whole [B, n, ...] to this process's [B, ceil(n / size), ...]."""
        return _Piece.apply(x, self)

    def whole(self, x: Tensor, n: int) -> Tensor:
        """Join the pieces [B, ceil(n / size), ...] of all processes to [B, n, ...], on each process."""
        return _Whole.apply(x, self, n)

    def tap(self, tokens: Tensor, n: int) -> Tensor:
        """The tokens of a tap: all, or inside a discriminator this process's share, without padding."""
        return tokens[:, : self._own(n)] if self.local_taps else self.whole(tokens, n)

    def embed(self, embedding: nn.Conv3d, latents: Tensor) -> Tensor:
        """This process's piece of the tokens `embedding(latents)`, [B, n, d]. The cut comes before the
        embedding, where tokens are smallest.
        """
        patches = to_patches(latents, embedding.kernel_size)  # [B, n, C pf ph pw]
        return F.linear(self.piece(patches), embedding.weight.flatten(1), embedding.bias)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Attention over whole sequences, in which each process computes its share of the heads.

        q, k, v: pieces [B, n, heads, channels] of one sequence, or of several one after another; `lengths`
        are the lengths of the whole sequences in k and v. attention: a function of q, k, v with all tokens.
        Returns the result for this process's q, [B, n, heads, channels].
        """
        q, k, v = (self._by_heads(x) for x in (q, k, v))  # [B, size, n, heads / size, channels]
        k, v = (self._unpadded(x, lengths) for x in (k, v))
        return self._by_tokens(attention(q.flatten(1, 2), k, v).unflatten(1, (self.size, -1)))

    def merge(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one q [B, heads, m, channels], the same on every process, to keys and values [B,
        heads, n, channels] that are split over the processes. Each process attends to its own, then the
        results are averaged with the sums of their exponentials as weights. Returns [B, heads, m, channels].
        """
        scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
        total = scores.logsumexp(3, keepdim=True)
        answer = (scores - total).exp() @ v.float()
        # [B, size, heads, m, channels + 1]
        both = self.whole(torch.cat((answer, total), dim=3)[:, None], self.size)
        answers, totals = both[..., :-1], both[..., -1:]
        return (totals.softmax(1) * answers).sum(1).type_as(q)

    def cut(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        length, own = -(-n // self.size), self._own(n)
        start = min(self.rank * length, n)
        piece = x[:, start : start + own]
        return (
            piece
            if own == length
            else torch.cat((piece, piece.new_zeros(x.shape[0], length - own, *x.shape[2:])), dim=1)
        )

    def collect(self, x: Tensor, n: int) -> Tensor:
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(pieces, x.contiguous(), group=self.group)
        return torch.cat(pieces, dim=1)[:, :n]

    def _own(self, n: int) -> int:
        length = -(-n // self.size)
        return min(max(n - self.rank * length, 0), length)

    def _by_heads(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b n (size h) c -> size b n h c", size=self.size)
        return rearrange(_Exchange.apply(x, self.group), "size b n h c -> b size n h c")

    def _by_tokens(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b size n h c -> size b n h c")
        return rearrange(_Exchange.apply(x, self.group), "size b n h c -> b n (size h) c")

    def _unpadded(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        if all(n % self.size == 0 for n in lengths):
            # The sequences come out interleaved. Attention does not depend on order if k and v agree.
            return x.flatten(1, 2)
        pieces = x.split([-(-n // self.size) for n in lengths], dim=2)
        return torch.cat([piece.flatten(1, 2)[:, :n] for piece, n in zip(pieces, lengths)], dim=1)


class UlyssesProcessor:
    """Wan's self-attention over the group; replaces diffusers' own processor."""

    _parallel_config = None  # of diffusers' own context parallelism

    def __init__(self, split: Split, backend: str | None = None):
        self.split, self._attention_backend = split, backend

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None
    ) -> Tensor:
        """hidden_states: a piece of the tokens, [B, n, d]; rotary_emb: the tables for all tokens, ([1, S, 1,
        channels], the same).
        """
        x, (cos, sin) = hidden_states, rotary_emb
        q, k, v = (
            attn.to_qkv(x).chunk(3, dim=2)
            if attn.fused_projections
            else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        )
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (attn.norm_q(q), attn.norm_k(k), v))
        table = self.split.cut(cos[..., 0::2]), self.split.cut(sin[..., 1::2])
        answer = self.split.attend(rotate(q, table), rotate(k, table), v, [cos.shape[1]], self._attention)
        return attn.to_out[1](attn.to_out[0](answer.flatten(2)))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self._attention_backend)


class _Piece(torch.autograd.Function):
    """Whole -> piece. A piece's gradient is its share times the group size; the whole tensor's is true."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Split) -> Tensor:
        ctx.split, ctx.n = split, x.shape[1]
        return split.cut(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.split.collect(grad, ctx.n) / ctx.split.size, None


class _Whole(torch.autograd.Function):
    """Pieces -> whole."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Split, n: int) -> Tensor:
        ctx.split = split
        return split.collect(x, n)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.split.cut(grad) * ctx.split.size, None, None


class _Exchange(torch.autograd.Function):
    """[size, ...]: entry r is sent to process r, and entry r of the result came from process r. The gradient
    travels back the same way.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
