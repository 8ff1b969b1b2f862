"""The losses of adversarial post-training (eq. 1, 2, 9, 10 and their successors), and the two training steps
that use them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AptError
from .generator import one_step

MODES = ("batched", "separate", "two_pass")
SIGMAS = {"image": 0.01, "video": 0.1}


@dataclass(frozen=True)
class Objective:
    """The losses of both networks. All means are over samples.

    relativistic: False is the paper's non-saturating loss; True compares each real sample with the fake of
    the same text.
    r1_weight, r1_sigma: lambda and sigma of the approximated R1 penalty on real samples (eq. 9); r2_*: the
    same for fakes.
    reg_fraction: the penalties use the first `ceil(reg_fraction * B)` samples and average over those.
    centering: the weight of `(real + fake)^2`, which keeps the level of the logits near 0; a relativistic
    loss alone leaves it free.
    r1_sigma_time, r2_sigma_time: another sigma for what differs between frames, see `perturbation`; None, as
    in the paper: one sigma for all.
    Raises AptError for negative weights, a penalty without a positive sigma, or a fraction outside (0, 1].
    """

    relativistic: bool = False
    r1_weight: float = 100.0
    r1_sigma: float = 0.01
    r2_weight: float = 0.0
    r2_sigma: float = 0.01
    reg_fraction: float = 1.0
    centering: float = 0.0
    r1_sigma_time: float | None = None
    r2_sigma_time: float | None = None

    def __post_init__(self):
        for name in ("r1_weight", "r2_weight", "centering"):
            if not getattr(self, name) >= 0:
                raise AptError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("r1", "r2"):
            for sigma in (f"{name}_sigma", f"{name}_sigma_time"):
                value = getattr(self, sigma)
                if getattr(self, f"{name}_weight") and value is not None and not value > 0:
                    raise AptError(f"{sigma} must be above 0 where {name}_weight is, got {value}.")
        if not 0 < self.reg_fraction <= 1:
            raise AptError(f"reg_fraction must be in (0, 1], got {self.reg_fraction}.")

    @classmethod
    def paper(cls, phase: str) -> "Objective":
        """Exactly the paper (eq. 10): non-saturating, aR1 with lambda 100, sigma 0.01 ("image") or 0.1
        ("video").
        """
        sigma = _sigma(phase)
        return cls(r1_weight=100.0, r1_sigma=sigma, r2_sigma=sigma)

    @classmethod
    def stable(cls, phase: str) -> "Objective":
        """What the authors use in later work: relativistic, aR1 and aR2 on a quarter of the batch, centring
        0.01.

        gamma = lambda sigma^2 is the strength to compare across sigmas; published values run from 0.01 to 10.
        Here it is 0.25 for both penalties and both phases, as in the one published run that also regularises
        a quarter of the batch and centres by 0.01.
        """
        sigma = _sigma(phase)
        weight = {"image": 2500.0, "video": 25.0}[phase]
        return cls(True, weight, sigma, weight, sigma, reg_fraction=0.25, centering=0.01)

    def gammas(self) -> dict[str, float]:
        """lambda sigma^2 of the penalties in use, which is the strength to compare across sigmas: r1_gamma,
        and r1_gamma_time if time has its own sigma; the same for r2.
        """
        found = {}
        for name in ("r1", "r2"):
            if weight := getattr(self, f"{name}_weight"):
                found[f"{name}_gamma"] = weight * getattr(self, f"{name}_sigma") ** 2
                if (time := getattr(self, f"{name}_sigma_time")) is not None:
                    found[f"{name}_gamma_time"] = weight * time**2
        return found

    def regularized(self, batch: int) -> int:
        """How many of `batch` samples the penalties use."""
        return math.ceil(self.reg_fraction * batch - 1e-9)  # 0.55 * 20 is a little above 11 in floating point


def _sigma(phase: str) -> float:
    if phase not in SIGMAS:
        raise AptError(f"phase must be one of {sorted(SIGMAS)}, got {phase!r}.")
    return SIGMAS[phase]


def discriminator_loss(
    real: Tensor, fake: Tensor, relativistic: bool = False, centering: float = 0.0
) -> Tensor:
    """Turn logits [B] into a scalar: `softplus(-r) + softplus(f)` (eq. 1 as a loss) or `softplus(f - r)`,
    plus `centering (r + f)^2`.
    """
    adversarial = F.softplus(fake - real) if relativistic else F.softplus(-real) + F.softplus(fake)
    return (adversarial + centering * (real + fake).square()).mean()


def generator_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Logits [B] to a scalar: `softplus(-f)` (eq. 2), or with `real` the relativistic `softplus(r - f)`."""
    return F.softplus(-fake if real is None else real - fake).mean()


def approximate_penalty(logit: Tensor, perturbed: Tensor) -> Tensor:
    """`(D(x, c) - D(x + sigma noise, c))^2` (eq. 9) without lambda, averaged over samples [B].

    It stands for the R1 penalty `|grad_x D|^2` (eq. 8) and is close to `sigma^2` times that for small sigma.
    """
    return (logit - perturbed).square().mean()


def perturbation(noise: Tensor, sigma: float, sigma_time: float | None = None) -> Tensor:
    """What an approximated penalty adds to its samples, from standard noise `[B, C, F, H, W]`: `sigma noise`
    (eq. 9), or with `sigma_time` the two parts of the noise, each times its own sigma.

    The part in space is the noise's mean over frames, which is the same in every frame; its elements have the
    variance `sigma^2 / F`. The part in time is the rest, which differs between frames and sums to 0 over
    them; its elements have the variance `sigma_time^2 (1 - 1 / F)`. The parts are orthogonal. So for small
    sigmas the penalty is `sigma^2` times the squared norm of D's gradient along changes that all frames
    share, plus `sigma_time^2` times that along changes between frames. Equal sigmas give the same as one
    sigma, and an image has no part in time. V-PAE gives its finite-difference R1 0.01 in space and 0.1 in
    time; we have not seen how it divides the noise, so this is our reading.
    """
    if sigma_time is None:
        return sigma * noise
    shared = noise.mean(dim=2, keepdim=True)
    return sigma * shared + sigma_time * (noise - shared)


def verdict(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How well logits [B] tell real from fake; 0.5 is chance for all three shares.

    right_real, right_fake: the shares of samples on the correct side of 0, where a non-saturating loss
    separates them. right_pairs: the share of texts whose real sample has the higher logit, whatever the level
    of both. A tie counts as half right.
    """
    share = lambda above: ((above > 0).float() + 0.5 * (above == 0).float()).mean()
    return {"right_real": share(real), "right_fake": share(-fake), "right_pairs": share(real - fake)}


@torch.no_grad()
def penalty_floor(
    discriminator: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    text: Tensor,
    noise: Tensor,
    sigma: float,
    sigma_time: float | None = None,
) -> Tensor:
    """What rounding alone adds to an approximated penalty (eq. 9) of this `sigma` (and `sigma_time`, see
    `perturbation`): the penalty at a hundredth of the sigmas.

    For a smooth discriminator the penalty there is ten thousand times smaller. In bf16 so small a
    perturbation is lost in the rounding of latents and activations, and what remains is the rounding itself.
    With sigma = 0 the same computation would run twice and give exactly 0, which says nothing. Arguments as
    in discriminator_backward. Returns a scalar, without lambda.
    """
    small = perturbation(noise, 0.01 * sigma, None if sigma_time is None else 0.01 * sigma_time)
    return approximate_penalty(discriminator(x, t, text), discriminator(x + small, t, text))


class _Pass(NamedTuple):
    x: Tensor
    t: Tensor
    text: Tensor


def _passes(objective: Objective, real, fake, text, t, real_noise, fake_noise) -> dict[str, _Pass]:
    """The discriminator's inputs of one step. A perturbed input differs from its original only by the
    noise.
    """
    if real.shape != fake.shape or t.shape != real.shape[:1] or text.shape[0] != real.shape[0]:
        raise AptError(
            f"real {tuple(real.shape)}, fake {tuple(fake.shape)}, t {tuple(t.shape)} and text "
            f"{tuple(text.shape)} do not form one batch."
        )
    fake = fake.detach()
    passes = {"real": _Pass(real, t, text), "fake": _Pass(fake, t, text)}
    n = objective.regularized(real.shape[0])
    for name, x, noise, weight, sigmas in (
        ("real", real, real_noise, objective.r1_weight, (objective.r1_sigma, objective.r1_sigma_time)),
        ("fake", fake, fake_noise, objective.r2_weight, (objective.r2_sigma, objective.r2_sigma_time)),
    ):
        if weight == 0:
            continue
        if noise is None or noise[:n].shape != x[:n].shape:
            raise AptError(
                f"the penalty on {name} samples needs standard noise for the first {n} of them "
                f"({name}_noise)."
            )
        passes[f"{name}_perturbed"] = _Pass(x[:n] + perturbation(noise[:n], *sigmas), t[:n], text[:n])
    return passes


def _discriminator_losses(objective: Objective, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    real, fake = logits["real"], logits["fake"]
    losses = {"d_adversarial": discriminator_loss(real, fake, objective.relativistic)}
    total = discriminator_loss(real, fake, objective.relativistic, objective.centering)
    for name, logit, weight in (("r1", real, objective.r1_weight), ("r2", fake, objective.r2_weight)):
        perturbed = logits.get("real_perturbed" if name == "r1" else "fake_perturbed")
        if perturbed is not None:
            losses[name] = approximate_penalty(logit[: len(perturbed)], perturbed)
            total = total + weight * losses[name]
    return {"d_loss": total, **losses}


def discriminator_backward(
    discriminator: Callable[[Tensor, Tensor, Tensor], Tensor],
    objective: Objective,
    real: Tensor,
    fake: Tensor,
    text: Tensor,
    t: Tensor,
    real_noise: Tensor | None = None,
    fake_noise: Tensor | None = None,
    mode: str = "separate",
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """One discriminator step: compute the gradients and add them to the parameters' `.grad`.

    discriminator: `(x, t, text) -> logits [B]`, deterministic; real, fake: clean latents [B, C, F, H, W]
    (fake is detached); text: [B, L, d]; t: [B] in [0, 1], the same for all passes of a sample; real_noise,
    fake_noise: standard noise of real's shape (the first `objective.regularized(B)` samples are enough),
    which is scaled by sigma here and needed where the penalty's weight is not 0.
    loss_scale: this microbatch's share of the whole batch under gradient accumulation. It scales the
    gradients and not the metrics.

    mode: three ways to the same gradients. "batched": one forward pass of all inputs concatenated, the
    fastest as long as there are few tokens.
    "separate": one forward pass per input and one backward pass. "two_pass": first all logits without
    gradients, then the derivative of the loss by each logit, then forward and backward for one input at a
    time. It holds the activations of only one input and costs one more forward pass for each.

    Returns detached scalars: d_loss, d_adversarial, logit_real and logit_fake (means), the shares of
    `verdict` (does it tell the two apart?), and for each penalty in use r1 or r2 (mean squared difference,
    without lambda), r1_loss or r2_loss (lambda times r1 or r2, comparable with d_adversarial) and the values
    of `Objective.gammas` (lambda sigma^2). Raises AptError for inputs that do not fit together or an unknown
    mode.
    """
    if mode not in MODES:
        raise AptError(f"discriminator mode must be one of {MODES}, got {mode!r}.")
    passes = _passes(objective, real, fake, text, t, real_noise, fake_noise)
    if mode == "batched":
        joined = discriminator(*(torch.cat(parts) for parts in zip(*passes.values())))
        logits = dict(zip(passes, joined.split([len(p.x) for p in passes.values()])))
    elif mode == "separate":
        logits = {name: discriminator(*p) for name, p in passes.items()}
    else:
        with torch.no_grad():
            logits = {name: discriminator(*p) for name, p in passes.items()}
        logits = {name: logit.requires_grad_() for name, logit in logits.items()}

    losses = _discriminator_losses(objective, logits)
    (losses["d_loss"] * loss_scale).backward()
    if mode == "two_pass":
        for name, p in passes.items():
            discriminator(*p).backward(logits[name].grad)

    metrics = {name: loss.detach() for name, loss in losses.items()}
    for name in ("real", "fake"):
        metrics[f"logit_{name}"] = logits[name].detach().mean()
    metrics |= verdict(logits["real"].detach(), logits["fake"].detach())
    for name, weight in (("r1", objective.r1_weight), ("r2", objective.r2_weight)):
        if name in metrics:
            metrics[f"{name}_loss"] = weight * metrics[name]
    return metrics | {
        name: metrics["d_loss"].new_full((), gamma) for name, gamma in objective.gammas().items()
    }


def generator_backward(
    generator,
    discriminator: nn.Module,
    objective: Objective,
    z: Tensor,
    text: Tensor,
    t: Tensor,
    real: Tensor | None = None,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """One generator step: sample `x_hat = G(z, c)` in one step (eq. 5), judge it with the frozen
    discriminator (eq. 2), and compute the gradients.

    generator: a velocity network that is called like WanBackbone; z: noise [B, C, F, H, W]; text: [B, L, d];
    t: [B] in [0, 1], freshly drawn; real: clean latents of the same texts, needed only by a relativistic
    objective; loss_scale: as in discriminator_backward.
    The discriminator's parameters do not require gradients during the call, keep the `.grad` that they had,
    and get their `requires_grad` back at the end, also after an error.

    Returns detached scalars: g_loss, logit_fake (mean), logit_real (relativistic only), and grad_norm, the
    mean over samples of |dL_i / dx_hat_i|, where L_i is the loss of one sample. grad_norm does not depend on
    the batch size or loss_scale, and it shows a collapse before the pictures do.
    Raises AptError when a relativistic objective gets no real samples.
    """
    if objective.relativistic and real is None:
        raise AptError(
            "a relativistic objective compares with real samples in the generator step too: pass real."
        )
    frozen = [p for p in discriminator.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        real_logit = None
        if objective.relativistic:
            with torch.no_grad():
                real_logit = discriminator(real, t, text)
        x_hat = one_step(generator, z, text)
        # Stop at the sample: we want its gradient, and this frees the discriminator's activations before the
        # generator's backward pass.
        sample = x_hat.detach().requires_grad_()
        fake_logit = discriminator(sample, t, text)
        loss = generator_loss(fake_logit, real_logit)
        loss.backward()
        gradient = cast(Tensor, sample.grad)  # a leaf has one after backward
        x_hat.backward(gradient * loss_scale)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    metrics = {
        "g_loss": loss.detach(),
        "logit_fake": fake_logit.detach().mean(),
        "grad_norm": gradient.flatten(1).norm(dim=1).mean() * len(sample),
    }
    if real_logit is not None:
        metrics["logit_real"] = real_logit.mean()
    return metrics
