"""Stage 1: discrete-time consistency distillation of the guided base model into one step (3.2, eq. 3 and
4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AptError
from ..models.wan import predict_velocity
from .flow import clean_from_velocity, interpolate, per_sample
from .flow import shift as shift_times
from .generator import guided_velocity


@dataclass(frozen=True)
class ConsistencySettings:
    """The settings of stage 1. The paper publishes one of them, the guidance, and leaves the others open.

    steps: N, the number of intervals between 0 and 1. Open in the paper; its base model
    samples in 25 steps, and a later work distilled with 32.
    shift: s of eq. 7, applied to the N + 1 times. Open; 1 spaces them evenly, videos need more of them near
    the noise.
    guidance: the teacher's constant classifier-free guidance. 3.2 uses 7.5; small models oversaturate at
    lower values than that.
    fraction_at_final: the share of samples that train on the last interval, [t_{N-1}, 1]. Open; 1 / N would
    be an even share. The finished generator is only called at t = 1, but what it learns there builds on what
    it has learned at all lower times.
    The loss is the plain mean squared error between clean predictions, with equal weight at all times (the
    paper leaves the weighting open).
    Raises AptError for values out of range.
    """

    steps: int = 25
    shift: float = 1.0
    guidance: float = 7.5
    fraction_at_final: float = 0.25

    def __post_init__(self):
        discrete_times(self.steps, self.shift)
        if not 0 <= self.fraction_at_final <= 1:
            raise AptError(f"fraction_at_final must be in [0, 1], got {self.fraction_at_final}.")


def discrete_times(steps: int, shift: float) -> Tensor:
    """The N + 1 times of stage 1, fp32 on the CPU: increasing, shifted by eq. 7, exactly 0 at the first and 1
    at the last.

    Raises AptError when `steps` < 1 or `shift` is not above 0.
    """
    if steps < 1:
        raise AptError(f"consistency distillation needs at least 1 step, got {steps}.")
    return shift_times(torch.arange(steps + 1, dtype=torch.float64) / steps, shift).float()


def choose_intervals(u: Tensor, steps: int, fraction_at_final: float) -> Tensor:
    """Turn uniform numbers `u` [B] in [0, 1) into interval numbers n in 0 .. N-1, int64 [B]. Interval n lies
    between t_n and t_{n+1}.

    The last interval gets the share `fraction_at_final`, the others divide the rest evenly. Each sample uses
    one number, so its interval does not depend on the rest of the batch (see flow.sample_uniform).
    """
    final = steps - 1
    if final == 0 or fraction_at_final >= 1:
        return torch.full_like(u, final, dtype=torch.int64)
    below = ((u - fraction_at_final) / (1 - fraction_at_final) * final).long().clamp(0, final - 1)
    return torch.where(u < fraction_at_final, final, below)


def consistency_backward(
    student,
    teacher,
    settings: ConsistencySettings,
    x: Tensor,
    z: Tensor,
    text: Tensor,
    negative: Tensor | None,
    u: Tensor,
    target=None,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """The gradients of one distillation step for the student.

    For each sample and its interval (t_n, t_{n+1}): mix data and noise to get `x_{t_{n+1}}`, take one Euler
    step of the guided teacher to `x_{t_n}`, and pull the student's clean prediction at the first point
    towards the target's clean prediction at the second. Where t_n = 0 the target's prediction is
    `x_{t_n} - 0 v`, which is the teacher's point itself. This is the boundary condition.

    student, teacher, target: velocity networks that are called like WanBackbone; only the student gets
    gradients. target: a copy of the student with its EMA weights, or None for the student itself without
    gradients (the paper leaves this choice open).
    x: clean latents [B, C, F, H, W]; z: noise of the same shape; text: [B, L, d]; negative: the embedding of
    the one fixed negative prompt, [1 or B, L, d], which may be None only with guidance 1; u: uniform numbers
    [B] that choose the intervals; loss_scale: this microbatch's share of the batch; it scales the gradients
    only.

    Returns detached scalars: cd_loss, cd_loss_final (the loss of samples at t = 1, or 0 without any) and
    final_share.
    Raises AptError when guidance needs a negative prompt and none is given.
    """
    times = discrete_times(settings.steps, settings.shift).to(x.device)
    n = choose_intervals(u.to(x.device), settings.steps, settings.fraction_at_final)
    t, t_lower = times[n + 1], times[n]
    x_t = interpolate(x.float(), z.float(), t)
    with torch.no_grad():
        v = guided_velocity(teacher, x_t, t, text, negative, settings.guidance)
        x_lower = x_t + per_sample(t_lower - t, x_t) * v
        v_target = predict_velocity(student if target is None else target, x_lower, t_lower, text)
        wanted = clean_from_velocity(x_lower, v_target, t_lower)
    predicted = clean_from_velocity(x_t, predict_velocity(student, x_t, t, text), t)
    per_item = (predicted - wanted).square().flatten(1).mean(dim=1)
    loss = per_item.mean()
    (loss * loss_scale).backward()
    final = (n == settings.steps - 1).float()
    return {
        "cd_loss": loss.detach(),
        "cd_loss_final": (per_item.detach() * final).sum() / final.sum().clamp(min=1),
        "final_share": final.mean(),
    }
