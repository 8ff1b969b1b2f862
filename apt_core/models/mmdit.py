"""The paper's own architecture (3.1): a dual-stream MMDiT of 36 blocks and 8 billion parameters, with the
same interface as WanBackbone.

Visual and text tokens have separate weights and attend jointly, as in Stable Diffusion 3; positions are 3D
RoPE; the time modulates both streams. The paper publishes nothing more about it, and no weights. We took the
details from diffusers' QwenImageTransformer2DModel, the plainest public dual-stream transformer, with 24
heads of 104 channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from ..errors import AptError
from .attention import attend
from .backbone import TokenSplit
from .patches import from_patches
from .wan import check_taps

EPS = 1e-6
TIME_CHANNELS = 256


def rotary_tables(
    grid: tuple[int, int, int], text_length: int, axes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, fp32 [2, tokens, 1, sum(axes) / 2], for visual and for text tokens.

    grid: frames, rows and columns of the visual tokens; axes: channels of a head for each of the three.
    Frames count from 0, rows and columns from the centre; text positions continue on the diagonal, from where
    the larger of the two ends.
    """
    _, rows, columns = grid
    starts = (0, rows // 2 - rows, columns // 2 - columns)
    counts = [torch.arange(n, device=device) + start for n, start in zip(grid, starts)]
    visual = torch.stack(torch.meshgrid(*counts, indexing="ij"), dim=-1).flatten(0, 2)  # [S, 3]
    text = (torch.arange(text_length, device=device) + max(rows // 2, columns // 2))[:, None].expand(-1, 3)
    return _table(visual, axes), _table(text, axes)


def _table(positions: Tensor, axes: Sequence[int]) -> Tensor:
    angles = []
    for axis, channels in enumerate(axes):
        frequencies = 10000.0 ** (
            -torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        )
        angles.append(positions[:, axis, None] * frequencies)
    angles = torch.cat(angles, dim=1)[:, None]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channels of `x` [B, n, heads, channels] by the angles of their position, in
    fp32.
    """
    cos, sin = table
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class Stream(nn.Module):
    """One of the two streams of a block, with its own modulation, attention weights and MLP.

    After `fuse`, to_q, to_k and to_v are None and one layer to_qkv replaces them; after `keep_keys_only`,
    to_q, norm_q, to_out, norm2 and mlp are gone.
    """

    to_qkv: nn.Linear | None
    to_q: nn.Linear | None

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = None
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // num_heads, EPS) for _ in range(2))
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    @property
    def keys_only(self) -> bool:
        """Whether nothing reads this stream after the block."""
        return self.mlp is None

    def project(self, x: Tensor, shift: Tensor, scale: Tensor, table: Tensor) -> list[Tensor]:
        """x: [B, n, dim]; shift, scale: [B, 1, dim]. Returns keys, values and, unless `keys_only`, queries,
        each [B, n, heads, channels].
        """
        x = self.norm1(x) * (1 + scale) + shift
        if self.to_qkv is not None:
            q, k, v = rearrange(self.to_qkv(x), "b n (qkv h c) -> qkv b n h c", qkv=3, h=self.num_heads)
            return [rotate(self.norm_k(k), table), v, rotate(self.norm_q(q), table)]
        k, v = (to(x).unflatten(2, (self.num_heads, -1)) for to in (self.to_k, self.to_v))
        k = rotate(self.norm_k(k), table)
        if self.to_q is None:
            return [k, v]
        q = self.to_q(x).unflatten(2, (self.num_heads, -1))
        return [k, v, rotate(self.norm_q(q), table)]

    def finish(
        self, x: Tensor, answer: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor
    ) -> Tensor:
        """x: [B, n, dim]; answer: the result of attention, [B, n, heads, channels]. Returns the stream
        [B, n, dim] after the block.
        """
        x = x + gate1 * self.to_out(answer.flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift)

    def fuse(self) -> None:
        """For inference: replace the layers for queries, keys and values by one. A stream that is `keys_only`
        stays as it is.
        """
        if self.to_q is None or self.to_qkv is not None:
            return
        parts = self.to_q, self.to_k, self.to_v
        fused = nn.Linear(self.to_q.in_features, 3 * self.to_q.out_features, device="meta")
        fused.weight, fused.bias = (
            nn.Parameter(torch.cat([getattr(part, name) for part in parts]), requires_grad=False)
            for name in ("weight", "bias")
        )
        self.to_qkv = fused
        self._drop("to_q", "to_k", "to_v")

    def keep_keys_only(self) -> None:
        """Remove the layers that only compute this stream's output. After the last block nothing reads that
        output, and these weights would get no gradient.
        """
        old, dim = self.modulation, self.to_k.in_features
        if self.to_q is None:
            return
        self._drop("to_q", "norm_q", "to_out", "norm2", "mlp")
        self.modulation = nn.Linear(dim, 2 * dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            self.modulation.weight.copy_(old.weight[: 2 * dim])
            self.modulation.bias.copy_(old.bias[: 2 * dim])
        self.modulation.requires_grad_(old.weight.requires_grad)

    def _drop(self, *names: str) -> None:
        for name in names:
            setattr(self, name, None)


class MMDiTBlock(nn.Module):
    """A block in which both streams attend to the tokens of both."""

    attention_backend: str | None = None
    """One of diffusers' attention backends; by default the one that is set for the process."""
    split: TokenSplit | None = None
    """How context_parallel.enable has split the tokens; None while every process has all of them."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.visual = Stream(dim, num_heads)
        self.text = Stream(dim, num_heads)

    def forward(
        self, tokens: Tensor, text: Tensor, time: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """tokens: visual, [B, S, dim]; text: [B, L, dim]; time: [B, dim]; tables: for visual and for text
        tokens. Returns both streams; the last block returns its text unchanged. Under context parallelism
        both streams are pieces, and the tables are whole.
        """
        lengths = [table.shape[1] for table in reversed(tables)]
        if self.split is not None:
            tables = self.split.cut(tables[0]), self.split.cut(tables[1])
        shift, scale, *rest = self.visual.modulation(time).unsqueeze(1).chunk(6, dim=2)
        k, v, q = self.visual.project(tokens, shift, scale, tables[0])
        keys_only = self.text.keys_only
        text_shift, text_scale, *text_rest = (
            self.text.modulation(time).unsqueeze(1).chunk(2 if keys_only else 6, dim=2)
        )
        text_k, text_v, *text_q = self.text.project(text, text_shift, text_scale, tables[1])
        q, k, v = torch.cat((*text_q, q), dim=1), torch.cat((text_k, k), dim=1), torch.cat((text_v, v), dim=1)
        attention = partial(attend, backend=self.attention_backend)
        answer = attention(q, k, v) if self.split is None else self.split.attend(q, k, v, lengths, attention)
        tokens = self.visual.finish(tokens, answer[:, -tokens.shape[1] :], *rest)
        if not keys_only:
            text = self.text.finish(text, answer[:, : text.shape[1]], *text_rest)
        return tokens, text


class MMDiTBackbone(ModelMixin, ConfigMixin):
    """The dual-stream transformer. Its defaults are the paper's 36 blocks and 8.0 billion parameters, with
    Wan's latents and text embeddings.

    The arguments have the names of WanTransformer3DModel's. axes_dims_rope: a head's channels for frames,
    rows and columns.
    Raises AptError when these are not even or do not add up to the channels of a head.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["MMDiTBlock"]
    _no_split_modules = ["MMDiTBlock"]
    _keep_in_fp32_modules = ["time_embedder"]

    output_head = ("norm_out", "modulation_out", "proj_out")
    """Submodules that only the velocity needs."""
    text_only = ("text.to_q", "text.to_out", "text.mlp")
    """Layers of a block that only serve the text of the next block."""
    official_name = staticmethod(str)
    image_conditioned = False
    split: TokenSplit | None = None
    """As in MMDiTBlock."""
    config: Any  # diffusers types it as a dict; it also has the arguments as attributes
    _gradient_checkpointing_func: Callable  # diffusers sets it together with gradient_checkpointing

    @register_to_config
    def __init__(
        self,
        num_layers: int = 36,
        num_attention_heads: int = 24,
        attention_head_dim: int = 104,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        axes_dims_rope: tuple[int, int, int] = (16, 44, 44),
    ):
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(channels % 2 for channels in axes_dims_rope):
            raise AptError(
                "axes_dims_rope must be three even numbers that add up to attention_head_dim "
                f"{attention_head_dim}, got {axes_dims_rope}."
            )
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, patch_size, patch_size)
        self.timesteps_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(TIME_CHANNELS, dim)
        self.text_norm = nn.RMSNorm(text_dim, EPS)
        self.text_embedding = nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList(MMDiTBlock(dim, num_attention_heads) for _ in range(num_layers))
        self._own_blocks()[-1].text.keep_keys_only()
        self.norm_out = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        taps: Sequence[int] | None = None,
    ):
        """The velocity, or with `taps` the visual tokens of inner blocks; the interface is WanBackbone's.

        hidden_states: [B, C, F, H, W] latents; timestep: [B] in 0..1000, kept in fp32; encoder_hidden_states:
        [B, L, text_dim], of which every row is attended to.
        taps: increasing 1-based block counts. Returns a list of visual tokens [B, S, d], and runs no block
        after the last tap.
        Raises AptError for taps outside the model and for a velocity after drop_output_head.
        """
        if taps is None and self.proj_out is None:
            raise AptError(
                "this backbone has no output head any more (drop_output_head): "
                "it can only be called with taps."
            )
        last = len(self.blocks) if taps is None else check_taps(taps, len(self.blocks))
        dtype = self.patch_embedding.weight.dtype
        latents = hidden_states.to(dtype)
        f, h, w = (n // p for n, p in zip(latents.shape[2:], self.config.patch_size))
        grid = f, h, w
        text = self.text_embedding(self.text_norm(encoder_hidden_states.to(dtype)))
        tables = rotary_tables(grid, text.shape[1], self.config.axes_dims_rope, latents.device)
        if self.split is None:
            tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, S, d]
        else:
            tokens, text = self.split.embed(self.patch_embedding, latents), self.split.piece(text)
        time = self.timesteps_proj(timestep).to(self.time_embedder.linear_1.weight.dtype)
        time = F.silu(self.time_embedder(time)).to(dtype)

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        features = []
        for count, block in enumerate(self.blocks[:last], start=1):
            if checkpointing:
                tokens, text = self._gradient_checkpointing_func(block, tokens, text, time, tables)
            else:
                tokens, text = block(tokens, text, time, tables)
            if taps is not None and count in taps:
                features.append(tokens)
        if taps is not None:
            return (
                features
                if self.split is None
                else [self.split.tap(tokens, math.prod(grid)) for tokens in features]
            )
        patches = self._head(tokens, time)
        if self.split is not None:
            patches = self.split.whole(patches, math.prod(grid))
        velocity = from_patches(patches, self.config.patch_size, latents.shape[2:])
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _own_blocks(self) -> list["MMDiTBlock"]:
        return cast("list[MMDiTBlock]", list(self.blocks))

    def _head(self, tokens: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation_out(time).unsqueeze(1).chunk(2, dim=2)
        return self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)

    def use_attention(self, backend: str) -> None:
        """Set the attention backend (attention.best_backend) of this model alone."""
        for block in self._own_blocks():
            block.attention_backend = backend

    def fuse_projections(self) -> None:
        """Compute queries, keys and values of each stream with one matrix product. The merged weights replace
        the three.
        """
        for block in self._own_blocks():
            block.visual.fuse()
            block.text.fuse()

    def share_tokens(self, split: TokenSplit) -> None:
        """Compute over the processes of a `context_parallel.Split`."""
        self.split = split
        for block in self._own_blocks():
            block.split = split

    def drop_output_head(self) -> None:
        """Remove norm_out, modulation_out and proj_out, which the discriminator never uses."""
        for name in self.output_head:
            setattr(self, name, None)

    def keep_blocks(self, count: int) -> None:
        """Remove every block after the first `count`, and the layers of the last block that only its text
        used.
        """
        self.blocks = self.blocks[:count]
        self._own_blocks()[-1].text.keep_keys_only()
        self.register_to_config(num_layers=count)
