"""The straight path of flow matching, the timestep shift, and per-sample randomness (paper 3.1 and 3.3)."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import AptError

Times = TypeVar("Times", Tensor, float)


def per_sample(t: Tensor | float, like: Tensor) -> Tensor | float:
    """Reshape `t` [B] so that it multiplies `like` [B, ...]. A float is returned as it is.

    Raises AptError when `t` is neither a number nor one value per sample.
    """
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    if t.shape != like.shape[:1]:
        raise AptError(
            f"time has shape {tuple(t.shape)}, but a batch of {like.shape[0]} needs shape ({like.shape[0]},)."
        )
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
    """`x_t = (1 - t) x + t z` (3.1). `x`, `z`: [B, ...]; `t`: [B] or a number, in [0, 1], 1 = pure noise."""
    t = per_sample(t, x)
    return (1 - t) * x + t * z


def velocity(x: Tensor, z: Tensor) -> Tensor:
    """`v = z - x`, what the network predicts (3.1). Any shape."""
    return z - x


def clean_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """`x = x_t - t v`: the clean sample that follows from velocity `v` [B, ...] at `x_t` [B, ...] and time
    `t` ([B] or a number).

    At t = 1 this is `z - v` (eq. 4 and 5), at t = 0 it is `x_t` itself.
    """
    return x_t - per_sample(t, x_t) * v


def shift(t: Times, s: float) -> Times:
    """`s t / (1 + (s - 1) t)` (eq. 7): with s > 1 it moves times towards the noise. Same shape as `t`, exact
    at 0 and 1.

    The paper uses s = 1 for images and 12 for videos. Keep `t` on the CPU: the range check of a tensor on a
    GPU waits for that GPU.
    Raises AptError when any `t` is outside [0, 1] (for example a timestep of 0 to 1000) or `s` is not above
    0.
    """
    if not s > 0:
        raise AptError(f"shift must be above 0, got {s}.")
    inside = bool(((t >= 0) & (t <= 1)).all()) if isinstance(t, Tensor) else 0 <= t <= 1
    if not inside:
        raise AptError("shift works on times in [0, 1]; divide timesteps of 0 to 1000 by 1000 first.")
    # 1 + (s - 1) t, written so that t = 1 gives exactly 1 for every s.
    return s * t / (s * t + (1 - t))


def _generator(seed: int, stream: str, index: int) -> np.random.Generator:
    # torch's CPU generator uses only 32 bits of a seed, so that a few million samples would share noise.
    # Philox uses 128.
    digest = hashlib.blake2b(f"{int(seed)}/{stream}/{int(index)}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


def sample_noise(indices: Iterable[int] | Tensor, shape: Sequence[int], seed: int, stream: str) -> Tensor:
    """Standard normal noise [len(indices), *shape], fp32 on the CPU.

    Item i depends only on (`seed`, `stream`, `indices[i]`, `shape`), so one process, many processes and a
    resumed run draw the same numbers. `indices` are global sample numbers (samples seen so far); `stream`
    names the purpose ("z", "r1").
    """
    indices = _as_list(indices)
    out = torch.empty(len(indices), *shape)
    for row, index in zip(out, indices):
        row.copy_(
            torch.from_numpy(_generator(seed, stream, index).standard_normal(tuple(shape), dtype=np.float32))
        )
    return out


def sample_uniform(indices: Iterable[int] | Tensor, seed: int, stream: str) -> Tensor:
    """Uniform numbers in [0, 1), [len(indices)], fp32 on the CPU. Each depends only on (`seed`, `stream`, its
    index).
    """
    return torch.tensor(
        [_generator(seed, stream, i).random(dtype=np.float32) for i in _as_list(indices)], dtype=torch.float32
    )


def _as_list(indices: Iterable[int] | Tensor) -> list[int]:
    return indices.tolist() if isinstance(indices, Tensor) else list(indices)
