"""The generator in one step (eq. 5) and in a few, and the base model's own many-step sampler."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import AptError
from ..models.wan import predict_velocity
from .flow import clean_from_velocity, interpolate
from .flow import shift as shift_times


def one_step(model, z: Tensor, text: Tensor) -> Tensor:
    """`G(z, c) = z - v(z, c, T)` (eq. 5), fp32. `z`: noise [B, C, F, H, W]; `text`: [B, L, text_dim].
    Differentiable.

    Equals, bit for bit, diffusers' WanPipeline with FlowMatchEulerDiscreteScheduler at one step and guidance
    1.
    """
    t = torch.ones(z.shape[0], device=z.device)
    return z.float() - predict_velocity(model, z, t, text)


@torch.no_grad()
def few_step(
    model, z: Tensor, text: Tensor, times: Sequence[float], noise_fn: Callable[[int], Tensor]
) -> Tensor:
    """Several steps of a one-step generator (3.5, zero-shot): predict clean, add fresh noise up to the next
    time, predict again.

    At each time t: `x = x_t - t v(x_t, c, t)`, then for the next time t' `x_t' = (1 - t') x + t' noise`. The
    paper does not print its two times: they are `times`, the first 1.0, strictly decreasing, above 0.
    `noise_fn(i)` gives fresh noise of z's shape before step i = 1, 2, ... (step 0 starts from `z`). Returns
    fp32 [B, C, F, H, W]; `times=(1.0,)` is `one_step`.
    Raises AptError for other times.
    """
    times = [float(t) for t in times]
    if not times or times[0] != 1.0 or not times[-1] > 0 or any(not a > b for a, b in zip(times, times[1:])):
        raise AptError(f"times must start at 1.0 and strictly decrease, staying above 0, got {times}.")
    x = x_t = z.float()
    for i, t in enumerate(times):
        if i:
            x_t = interpolate(x, noise_fn(i).to(x), t)
        v = predict_velocity(model, x_t, torch.full((z.shape[0],), t, device=z.device), text)
        x = clean_from_velocity(x_t, v, t)
    return x


def guided_velocity(
    model, x_t: Tensor, t: Tensor, text: Tensor, negative: Tensor | None, scale: float
) -> Tensor:
    """Classifier-free guidance: `v(negative) + scale (v(text) - v(negative))`, fp32, shape of `x_t`.

    negative: [B or 1, L, text_dim], one fixed prompt for the whole batch or one per sample. Two calls, so
    that the memory of one suffices; `scale == 1` makes a single call and needs no negative. Raises AptError
    when one is needed and missing.
    """
    v = predict_velocity(model, x_t, t, text)
    if scale == 1:
        return v
    if negative is None:
        raise AptError(
            f"guidance of scale {scale} needs the embedding of a negative prompt (an empty one will do)."
        )
    v_negative = predict_velocity(model, x_t, t, negative.expand(x_t.shape[0], -1, -1))
    return v_negative + scale * (v - v_negative)


@torch.no_grad()
def euler_cfg(
    model, z: Tensor, text: Tensor, negative: Tensor | None, steps: int, scale: float, shift: float
) -> Tensor:
    """The base model's sampler: Euler steps from t = 1 to exactly 0, with guidance. Returns fp32 [B, C, F, H,
    W].

    The times are `shift(1 - i / steps, s)` (eq. 7), i = 0 .. steps; the network is called at all of them but
    the last, twice each unless `scale == 1`. The paper's reference uses 25 steps and scale 7.5. Raises
    AptError when `steps` < 1.
    """
    if steps < 1:
        raise AptError(f"the sampler needs at least 1 step, got {steps}.")
    times = [shift_times(1 - i / steps, shift) for i in range(steps + 1)]
    x = z.float()
    for t, t_next in zip(times, times[1:]):
        v = guided_velocity(model, x, torch.full((z.shape[0],), t, device=z.device), text, negative, scale)
        x = x + (t_next - t) * v
    return x
