"""The generator in one step (eq. 5) and in a few, and the base model's own many-step sampler."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import AptError
from ..models.wan import predict_velocity
from .flow import clean_from_velocity, interpolate
from .flow import shift as shift_times


def one_step(model, z: Tensor, text: Tensor) -> Tensor:
    """`G(z, c) = z - v(z, c, T)` in fp32: eq. 5, and eq. 3 and 4 with the distilled weights. `z`: noise
    [B, C, F, H, W]; `text`: [B, L, text_dim]. Differentiable.

    Equal, bit for bit, to diffusers' WanPipeline with FlowMatchEulerDiscreteScheduler at one step and
    guidance 1.
    """
    t = torch.ones(z.shape[0], device=z.device)
    return z.float() - predict_velocity(model, z, t, text)


@torch.no_grad()
def few_step(
    model, z: Tensor, text: Tensor, times: Sequence[float], noise_fn: Callable[[int], Tensor]
) -> Tensor:
    """Sample in several steps with a one-step generator (3.5, zero-shot): predict the clean sample, add fresh
    noise up to the next time, predict again.

    At each time t: `x = x_t - t v(x_t, c, t)`, then for the next time t' `x_t' = (1 - t') x + t' noise`. The
    paper does not state its two times. `times` starts at 1.0, strictly decreases and stays above 0.
    `noise_fn(i)` returns fresh noise of z's shape before step i = 1, 2, ... (step 0 starts from `z`). Returns
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
    """Classifier-free guidance: `v(negative) + scale (v(text) - v(negative))`, fp32, with the shape of `x_t`.

    negative: [B or 1, L, text_dim], one fixed prompt for the whole batch or one per sample. The network is
    called twice in turn, so that the memory of one call is enough; with `scale == 1` it is called once and
    needs no negative prompt. Raises AptError when a negative prompt is needed and missing.
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
    """The base model's sampler: Euler steps from t = 1 to exactly 0, with guidance. Returns fp32
    [B, C, F, H, W].

    The times are `shift(1 - i / steps, s)` (eq. 7), i = 0 .. steps. The network is called at each of them
    except the last: twice, or once when `scale == 1`. The paper's reference uses 25 steps and scale 7.5.
    Raises AptError when `steps` < 1.
    """
    if steps < 1:
        raise AptError(f"the sampler needs at least 1 step, got {steps}.")
    times = [shift_times(1 - i / steps, shift) for i in range(steps + 1)]
    x = z.float()
    for t, t_next in zip(times, times[1:]):
        v = guided_velocity(model, x, torch.full((z.shape[0],), t, device=z.device), text, negative, scale)
        x = x + (t_next - t) * v
    return x
