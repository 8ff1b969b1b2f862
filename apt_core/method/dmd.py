"""Stage 1 by distribution matching, as an alternative to the paper's consistency distillation (3.2).

It is not part of the paper. The gradient is that of DMD (arXiv 2311.18828), its two time scales are DMD2's
(arXiv 2405.14867, 4.2), and the idea of a fake score that is a LoRA on the teacher is VSD's (arXiv
2305.16213). It is written for the straight path `x_t = (1 - t) x + t noise`: a velocity v implies the clean
sample `x_t - t v` and the score `-(x_t + (1 - t) v) / t`.

Noise is added to a sample of the generator. At that point the real score, from the guided base, points to
where the base's samples are denser. The fake score, which is trained on the generator's samples all along,
points to where the generator's samples are denser. Their difference is the gradient of
KL(generator || base) at that noise level.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import AptError
from ..models.wan import predict_velocity
from .flow import clean_from_velocity, interpolate, per_sample, velocity
from .flow import shift as shift_times
from .generator import guided_velocity, one_step

Weighting = Literal["dmd", "kl"]


@dataclass(frozen=True)
class DmdSettings:
    """t_min, t_max: the range of times at which a sample is noised (DMD: .02 and .98; V-PAE's start: .9 and
    1); shift: s of eq. 7 on these times, where 1 is uniform.
    guidance: of the real score.
    weighting: "dmd" divides the difference of the two clean predictions by the mean distance of the real one
    from the sample (DMD, eq. 8), so that all times count alike; "kl" is the gradient of the divergence
    itself. regression: weight of the mean squared distance to the teacher's own sample from the same noise
    (DMD, 3.3, on latents instead of LPIPS); 0 turns it off.
    Raises AptError for values out of range.
    """

    t_min: float = 0.02
    t_max: float = 0.98
    shift: float = 1.0
    guidance: float = 7.5
    weighting: Weighting = "dmd"
    regression: float = 0.0

    def __post_init__(self):
        if not 0 < self.t_min <= self.t_max <= 1:
            raise AptError(
                "times of distribution matching must be 0 < t_min <= t_max <= 1, got "
                f"{self.t_min} and {self.t_max}."
            )
        if not self.shift > 0:
            raise AptError(f"shift must be above 0, got {self.shift}.")
        if self.weighting not in ("dmd", "kl"):
            raise AptError(f"weighting must be 'dmd' or 'kl', got {self.weighting!r}.")
        if not self.regression >= 0:
            raise AptError(f"regression must not be negative, got {self.regression}.")


def noise_times(u: Tensor, settings: DmdSettings) -> Tensor:
    """Turn uniform numbers `u` [B] in [0, 1) into times [B]: `shift(U(0, 1), s)` (eq. 7) restricted to
    [t_min, t_max]. Keep `u` on the CPU, as for `shift`.
    """
    low, high = (shift_times(t, 1 / settings.shift) for t in (settings.t_min, settings.t_max))
    return shift_times(low + (high - low) * u, settings.shift).clamp(settings.t_min, settings.t_max)


def score(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """`grad log p_t(x_t) = -(x_t + (1 - t) v) / t`, the score of the density with velocity `v` at `x_t`, both
    [B, ...]; `t`: [B] or a number, above 0.
    """
    t = per_sample(t, x_t)
    return -(x_t + (1 - t) * v) / t


def matching_gradient(
    x: Tensor, x_t: Tensor, v_real: Tensor, v_fake: Tensor, t: Tensor, weighting: Weighting = "dmd"
) -> Tensor:
    """The gradient at the generator's sample `x` [B, ...]. Both velocities were predicted at `x_t`, the
    noised `x`.

    "kl": `(1 - t) (s_fake - s_real)`, since `x_t` contains `(1 - t) x` (DMD, eq. 7 with w_t = 1). Its mean
    over samples and noise is the gradient of the KL divergence of the two densities at time t. "dmd":
    `(x_fake - x_real) / mean |x - x_real|` of the clean predictions, which has the same direction (eq. 8).
    """
    if weighting == "kl":
        return (1 - per_sample(t, x)) * (score(x_t, v_fake, t) - score(x_t, v_real, t))
    real, fake = clean_from_velocity(x_t, v_real, t), clean_from_velocity(x_t, v_fake, t)
    distance = (x - real).abs().flatten(1).mean(dim=1).clamp(min=1e-6)
    return (fake - real) / per_sample(distance, x)


def fake_backward(
    fake,
    generator,
    z: Tensor,
    text: Tensor,
    noise: Tensor,
    t: Tensor,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """One step of the fake score up to its gradients: flow matching on samples of the current generator (DMD,
    3.2).

    fake, generator: velocity networks that are called like WanBackbone; only the fake score gets gradients.
    z, noise: [B, C, F, H, W], z for the sample and noise for its noising; text: [B, L, d]; t: times [B] of
    `noise_times`; loss_scale: this microbatch's share of the batch; it scales the gradients only.

    Returns detached scalars: fake_loss.
    """
    with torch.no_grad():
        x = one_step(generator, z, text)
    predicted = predict_velocity(fake, interpolate(x, noise.float(), t), t, text)
    loss = (predicted - velocity(x, noise.float())).square().mean()
    (loss * loss_scale).backward()
    return {"fake_loss": loss.detach()}


def dmd_backward(
    generator,
    real,
    fake,
    settings: DmdSettings,
    z: Tensor,
    text: Tensor,
    negative: Tensor | None,
    noise: Tensor,
    t: Tensor,
    wanted: Tensor | None = None,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """One step of the generator up to its gradients: `mean over elements of x stopgrad(matching_gradient)`,
    plus the regression.

    generator, real, fake: velocity networks that are called like WanBackbone; only the generator gets
    gradients, and no activations of the scores are kept. z, text, noise, t, loss_scale: as in
    `fake_backward`; negative: the embedding of the one fixed negative prompt [1 or B, L, d], which may be
    None only with guidance 1; wanted: the teacher's own samples from `z`, needed where `regression` is not 0.

    Returns detached scalars: gap, the mean absolute difference of the two clean predictions; real_distance,
    that between the sample and the real prediction; grad_norm, the mean over samples of |dL_i / dx_i|, where
    L_i is the loss of one sample; and with a regression regression_loss (without its weight).
    Raises AptError when guidance needs a negative prompt, or the regression needs samples, and gets none.
    """
    if settings.regression and wanted is None:
        raise AptError(f"a regression of weight {settings.regression} needs the teacher's samples (wanted).")
    x_hat = one_step(generator, z, text)
    with torch.no_grad():
        x = x_hat.detach()
        x_t = interpolate(x, noise.float(), t)
        v_real = guided_velocity(real, x_t, t, text, negative, settings.guidance)
        v_fake = predict_velocity(fake, x_t, t, text)
        gradient = matching_gradient(x, x_t, v_real, v_fake, t, settings.weighting) / x[0].numel()
        metrics = {
            "gap": (per_sample(t, x) * (v_real - v_fake)).abs().mean(),
            "real_distance": (x - clean_from_velocity(x_t, v_real, t)).abs().mean(),
        }
        if settings.regression and wanted is not None:
            metrics["regression_loss"] = (x - wanted).square().mean()
            gradient = gradient + settings.regression * 2 * (x - wanted) / x[0].numel()
        metrics["grad_norm"] = gradient.flatten(1).norm(dim=1).mean()
    x_hat.backward(gradient * (loss_scale / len(x)))
    return metrics
