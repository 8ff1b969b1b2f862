import math

import pytest
import torch
from torch import nn

from apt_core.errors import AptError
from apt_core.method.objectives import (
    MODES,
    Objective,
    approximate_penalty,
    discriminator_backward,
    discriminator_loss,
    generator_backward,
    generator_loss,
    penalty_floor,
    verdict,
)

PRESETS = [f(phase) for f in (Objective.paper, Objective.stable) for phase in ("image", "video")]


def softplus(x):
    return math.log1p(math.exp(x))


def take_grads(model):
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def assert_close(a, b, tol=1e-10):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tol, rtol=tol), name


def doubles(*inputs):
    return [x.double() for x in inputs]


class Spy(nn.Module):
    """A smooth discriminator of (x, t, text) that leans on t and text far more than on x, and remembers what
    it was asked.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 4))
        self.calls = []

    def forward(self, x, t, text):
        self.calls.append((x.detach(), t, text))
        return torch.einsum("bcfhw,c->b", torch.sin(x), self.w) / 10 + 10 * t + text.flatten(1).sum(1)


# ---- the losses, by hand


def test_presets():
    assert Objective.paper("image") == Objective(False, 100.0, 0.01, 0.0, 0.01, 1.0, 0.0)
    assert Objective.paper("video") == Objective(False, 100.0, 0.1, 0.0, 0.1, 1.0, 0.0)
    for phase, sigma in (("image", 0.01), ("video", 0.1)):
        o = Objective.stable(phase)
        assert (o.relativistic, o.reg_fraction, o.centering, o.r1_sigma, o.r2_sigma) == (
            True,
            0.25,
            0.01,
            sigma,
            sigma,
        )
        assert o.r1_weight * o.r1_sigma**2 == pytest.approx(0.25) == o.r2_weight * o.r2_sigma**2
    with pytest.raises(AptError, match="phase"):
        Objective.paper("audio")


@pytest.mark.parametrize(
    "kw",
    [
        {"r1_weight": -1},
        {"r1_sigma": 0},
        {"r2_weight": 1, "r2_sigma": 0},
        {"reg_fraction": 0},
        {"reg_fraction": 1.5},
        {"centering": -0.1},
    ],
)
def test_objective_refuses(kw):
    with pytest.raises(AptError):
        Objective(**kw)


def test_regularized_part_is_the_ceiling():
    sizes = {
        (0.25, 1): 1,
        (0.25, 4): 1,
        (0.25, 5): 2,
        (0.25, 8): 2,
        (1.0, 7): 7,
        (0.55, 20): 11,
        (0.1, 30): 3,
    }
    assert {(f, n): Objective(reg_fraction=f).regularized(n) for f, n in sizes} == sizes


def test_losses_by_hand():
    r, f = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.25], dtype=torch.float64)
    assert discriminator_loss(r, f).item() == pytest.approx(
        (softplus(-0.5) + softplus(2.0) + softplus(1.0) + softplus(0.25)) / 2, abs=1e-12
    )
    relativistic = (softplus(1.5) + softplus(1.25)) / 2
    assert discriminator_loss(r, f, relativistic=True).item() == pytest.approx(relativistic, abs=1e-12)
    centred = relativistic + 0.01 * (2.5**2 + 0.75**2) / 2
    assert discriminator_loss(r, f, relativistic=True, centering=0.01).item() == pytest.approx(
        centred, abs=1e-12
    )
    assert generator_loss(f).item() == pytest.approx((softplus(-2.0) + softplus(-0.25)) / 2, abs=1e-12)
    assert generator_loss(f, r).item() == pytest.approx((softplus(-1.5) + softplus(-1.25)) / 2, abs=1e-12)
    assert approximate_penalty(r, f).item() == pytest.approx((1.5**2 + 1.25**2) / 2, abs=1e-12)


def test_directions_and_offsets():
    r, f = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    for relativistic in (False, True):
        g_r, g_f = torch.autograd.grad(discriminator_loss(r, f, relativistic), (r, f))
        assert (g_r < 0).all() and (g_f > 0).all()  # real up, fake down
        assert (
            torch.autograd.grad(generator_loss(f, r if relativistic else None), f)[0] < 0
        ).all()  # fake up
    a, b = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.allclose(
        discriminator_loss(a, b, True), discriminator_loss(a + 3, b + 3, True), rtol=0, atol=1e-12
    )
    assert torch.allclose(generator_loss(a, b), generator_loss(a + 3, b + 3), rtol=0, atol=1e-12)
    assert torch.isfinite(discriminator_loss(torch.full((1,), -1e4), torch.full((1,), 1e4)))


# ---- aR1


@pytest.mark.parametrize("mode", MODES)
def test_perturbed_passes_differ_in_the_noise_and_in_nothing_else(batch, mode):
    real, fake, text, t, real_noise, fake_noise = batch(5)
    spy = Spy()
    o = Objective(r1_weight=2.0, r1_sigma=0.3, r2_weight=3.0, r2_sigma=0.7, reg_fraction=0.5)
    discriminator_backward(spy, o, real, fake, text, t, real_noise, fake_noise, mode)
    x, times, texts = (torch.cat(parts) for parts in zip(*spy.calls[: 1 if mode == "batched" else 4]))
    assert torch.equal(
        x, torch.cat([real, fake, real[:3] + 0.3 * real_noise[:3], fake[:3] + 0.7 * fake_noise[:3]])
    )
    assert torch.equal(times, torch.cat([t, t, t[:3], t[:3]]))
    assert torch.equal(texts, torch.cat([text, text, text[:3], text[:3]]))


def test_penalty_vanishes_with_sigma_though_the_logit_leans_on_t(batch):
    real, fake, text, t, noise, _ = batch(4)
    r1 = []
    for sigma in (1e-1, 1e-2, 1e-3):
        metrics = discriminator_backward(
            Spy().double(), Objective(r1_sigma=sigma), *(x.double() for x in (real, fake, text, t, noise))
        )
        r1.append(metrics["r1"].item())
    assert r1[0] / r1[1] == pytest.approx(100, rel=0.1) and r1[1] / r1[2] == pytest.approx(100, rel=0.02)
    assert r1[2] < 1e-6


def test_penalty_is_autograds_r1_for_small_sigma(double, disc, batch):
    d, n, sigma = disc().double(), 512, 3e-3
    real, fake, text, t, *_ = (x[:1] for x in doubles(*batch(1)))
    real, t, text = real.clone().requires_grad_(), t[:1], text[:1]
    (gradient,) = torch.autograd.grad(d(real, t, text).sum(), real)
    noise = torch.randn(n, *real.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    many = [x.detach().expand(n, *x.shape[1:]) for x in (real, fake, text, t)]
    r1 = discriminator_backward(d, Objective(r1_sigma=sigma), *many, noise)["r1"].item()
    along_the_same_noise = (sigma * (noise * gradient).flatten(1).sum(1)).square().mean().item()
    assert r1 == pytest.approx(along_the_same_noise, rel=0.01)
    # the mean of chi^2 over 512 draws
    assert r1 == pytest.approx(sigma**2 * gradient.square().sum().item(), rel=0.2)


# ---- the discriminator step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", PRESETS)
def test_modes_against_the_formula(double, disc, batch, mode, objective):
    d = disc().double()
    real, fake, text, t, real_noise, fake_noise = doubles(*batch(5))
    metrics = discriminator_backward(d, objective, real, fake, text, t, real_noise, fake_noise, mode)
    got = take_grads(d)

    n = 5 if objective.reg_fraction == 1 else 2
    r, f = d(real, t, text), d(fake, t, text)
    r1 = (r[:n] - d(real[:n] + objective.r1_sigma * real_noise[:n], t[:n], text[:n])).square().sum() / n
    loss = objective.r1_weight * r1
    if objective.relativistic:
        r2 = (f[:n] - d(fake[:n] + objective.r2_sigma * fake_noise[:n], t[:n], text[:n])).square().sum() / n
        adversarial = torch.log1p(torch.exp(f - r)).mean()
        loss = loss + objective.r2_weight * r2 + 0.01 * (r + f).square().mean()
        assert metrics["r2"].item() == pytest.approx(r2.item(), rel=1e-9, abs=1e-12)
        assert metrics["r2_gamma"].item() == pytest.approx(0.25)
    else:
        adversarial = -(torch.sigmoid(r).log() + torch.sigmoid(-f).log()).mean()
        assert "r2" not in metrics and "r2_gamma" not in metrics
    (loss + adversarial).backward()
    assert_close(got, take_grads(d), tol=1e-9)
    assert metrics["d_loss"].item() == pytest.approx((loss + adversarial).item(), abs=1e-9)
    assert metrics["d_adversarial"].item() == pytest.approx(adversarial.item(), abs=1e-9)
    assert metrics["r1"].item() == pytest.approx(r1.item(), rel=1e-9, abs=1e-12)
    assert metrics["r1_gamma"].item() == pytest.approx(objective.r1_weight * objective.r1_sigma**2)
    assert metrics["logit_real"].item() == pytest.approx(r.mean().item(), abs=1e-9)
    assert metrics["logit_fake"].item() == pytest.approx(f.mean().item(), abs=1e-9)
    assert not any(v.requires_grad or v.ndim for v in metrics.values())


def all_modes(d, objective, inputs):
    results = {}
    for mode in MODES:
        metrics = discriminator_backward(d, objective, *inputs, mode=mode)
        results[mode] = metrics, take_grads(d)
    return results


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", PRESETS)
def test_three_modes_are_equal(double, disc, batch, objective, checkpointing):
    d = disc().double()
    if checkpointing:
        d.enable_gradient_checkpointing()
    results = all_modes(d, objective, doubles(*batch(5)))
    for mode in ("separate", "two_pass"):
        assert_close(results[mode][0], results["batched"][0], tol=1e-10)
        assert_close(results[mode][1], results["batched"][1], tol=1e-10)


ROUNDING = 16 * 2**-23
"""What fp32 leaves uncertain of a logit near 1, and of a gradient as a share of the largest: 16 of its
spacings.

A logit was off by 3 to 5 of them with AVX-512, with AVX2 and with neither.
"""


def rounding(d, objective, real, fake, text, t, real_noise, fake_noise):
    """How far the metrics and the gradients of one step may be from fp64's where logits and gradients are
    only known to ROUNDING.

    The penalty's gradient is 2 lambda (D(x) - D(x + e)) (grad D(x) - grad D(x + e)). Both of its differences
    are small, lambda is not: two logits' rounding times what the gradients differ by, and the logits'
    difference times two gradients' rounding.
    """

    def one_by_one(x, n):
        logits = [d(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(n)]
        return torch.cat(logits).detach(), [
            torch.cat([g.flatten() for g in torch.autograd.grad(logit, list(d.parameters()))])
            for logit in logits
        ]

    n = objective.regularized(len(real))
    of_logits, of_gradients, largest = ROUNDING, 0.0, 0.0
    for x, noise, weight, sigma in (
        (real, real_noise, objective.r1_weight, objective.r1_sigma),
        (fake, fake_noise, objective.r2_weight, objective.r2_sigma),
    ):
        logits, gradients = one_by_one(x, len(x))
        largest = max(largest, *(float(g.abs().max()) for g in gradients))
        perturbed, others = one_by_one(x[:n] + sigma * noise[:n], n)
        for logit, other, gradient, beside in zip(logits[:n], perturbed, gradients[:n], others):
            apart = float((logit - other).abs())
            of_logits += 2 * weight / n * apart * 2 * ROUNDING
            of_gradients += (
                2
                * weight
                / n
                * (2 * ROUNDING * float((gradient - beside).abs().max()) + apart * 2 * ROUNDING * largest)
            )
    return of_logits, of_gradients + 2 * ROUNDING * largest


@pytest.mark.parametrize("objective", PRESETS)
def test_fp32_is_as_near_to_fp64_as_its_rounding(disc, batch, monkeypatch, objective):
    """In every mode. That the modes are one is shown above; in bf16, of 2^-8, a logit's rounding would be
    2000 times as much.
    """
    results = all_modes(disc(), objective, batch(5))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    d, inputs = disc().double(), doubles(*batch(5))
    expected, gradients = all_modes(d, objective, inputs)["separate"]
    of_metrics, of_gradients = rounding(d, objective, *inputs)
    for metrics, found in results.values():
        assert {value.dtype for value in (*metrics.values(), *found.values())} == {torch.float32}
        for name, value in expected.items():
            assert abs(metrics[name].double() - value) <= of_metrics, name
        for name, value in gradients.items():
            assert (found[name].double() - value).abs().max() <= of_gradients, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "objective", [Objective.paper("video"), Objective(True, 25.0, 0.1, 25.0, 0.1, 0.5, 0.01)]
)
def test_accumulation_gives_the_whole_batchs_gradient(double, disc, batch, mode, objective):
    d = disc().double()
    inputs = doubles(*batch(4))
    # every microbatch regularises its own first half, so the whole batch needs that order
    if objective.reg_fraction == 0.5:
        order = torch.tensor([0, 2, 1, 3])
    else:
        order = torch.arange(4)
    whole = discriminator_backward(d, objective, *(x[order] for x in inputs), mode=mode)
    expected = take_grads(d)
    parts = [
        discriminator_backward(d, objective, *(x[s : s + 2] for x in inputs), mode=mode, loss_scale=0.5)
        for s in (0, 2)
    ]
    assert_close(take_grads(d), expected)
    assert_close({k: (parts[0][k] + parts[1][k]) / 2 for k in whole}, whole)


def test_fake_gets_no_gradient_and_grads_accumulate(double, disc, batch):
    d = disc().double()
    real, fake, text, t, noise, _ = doubles(*batch())
    fake.requires_grad_()
    discriminator_backward(d, Objective(), real, fake, text, t, noise)
    assert fake.grad is None
    once = {n: p.grad.clone() for n, p in d.named_parameters()}
    discriminator_backward(d, Objective(), real, fake, text, t, noise)
    assert_close(take_grads(d), {n: 2 * g for n, g in once.items()})


def test_bad_inputs(disc, batch):
    d = disc()
    real, fake, text, t, noise, _ = batch(4)
    for args, message in (
        ((real, fake[:2], text, t, noise), "one batch"),
        ((real, fake, text, t[:1], noise), "one batch"),
        ((real, fake, text[:1], t, noise), "one batch"),
        ((real, fake, text, t, None), "real_noise"),
        ((real, fake, text, t, noise[:1]), "real_noise"),
    ):
        with pytest.raises(AptError, match=message):
            discriminator_backward(d, Objective(), *args)
    with pytest.raises(AptError, match="fake_noise"):
        discriminator_backward(d, Objective.stable("image"), real, fake, text, t, noise)
    with pytest.raises(AptError, match="mode"):
        discriminator_backward(d, Objective(), real, fake, text, t, noise, mode="fast")
    discriminator_backward(d, Objective(r1_weight=0.0), real, fake, text, t)
    with pytest.raises(AptError, match="real"):
        generator_backward(None, d, Objective.stable("image"), noise, text, t)


# ---- the generator step


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("relativistic", [False, True])
def test_generator_step(double, wan, disc, batch, relativistic, checkpointing):
    g, d = wan(seed=7).double(), disc().double()
    if checkpointing:
        g.enable_gradient_checkpointing()
        d.enable_gradient_checkpointing()
    real, _, text, t, z, _ = doubles(*batch(3))
    objective = Objective(relativistic=relativistic)
    next(d.parameters()).requires_grad_(False)  # a parameter that was frozen before stays so
    wanted = [p.requires_grad for p in d.parameters()]
    old = torch.ones_like(d.logit.weight)
    d.logit.weight.grad = old
    metrics = generator_backward(g, d, objective, z, text, t, real)
    got = take_grads(g)
    assert d.logit.weight.grad is old and torch.equal(old, torch.ones_like(old))
    assert [n for n, p in d.named_parameters() if p.grad is not None] == ["logit.weight"]
    assert [p.requires_grad for p in d.parameters()] == wanted

    x_hat = z - g(z, torch.full((3,), 1000.0, dtype=torch.float64), text).sample
    x_hat.retain_grad()
    f, r = d(x_hat, t, text), d(real, t, text).detach()
    losses = torch.log1p(torch.exp((r if relativistic else 0) - f))
    losses.mean().backward()
    assert_close(got, take_grads(g))
    assert got.keys() == {n for n, _ in g.named_parameters()}
    assert all(v.abs().sum() > 0 for v in got.values())
    assert metrics["g_loss"].item() == pytest.approx(losses.mean().item(), abs=1e-10)
    assert metrics["logit_fake"].item() == pytest.approx(f.mean().item(), abs=1e-10)
    assert ("logit_real" in metrics) == relativistic
    if relativistic:
        assert metrics["logit_real"].item() == pytest.approx(r.mean().item(), abs=1e-10)
    per_sample = [3 * gradient.norm().item() for gradient in x_hat.grad]
    assert metrics["grad_norm"].item() == pytest.approx(sum(per_sample) / 3, rel=1e-9)
    assert not any(v.requires_grad or v.ndim for v in metrics.values())


def test_generator_accumulation(double, wan, disc, batch):
    g, d = wan(seed=7).double(), disc().double()
    _, _, text, t, z, _ = doubles(*batch(4))
    whole = generator_backward(g, d, Objective(), z, text, t)
    expected = take_grads(g)
    parts = [
        generator_backward(g, d, Objective(), z[s : s + 2], text[s : s + 2], t[s : s + 2], loss_scale=0.5)
        for s in (0, 2)
    ]
    assert_close(take_grads(g), expected)
    assert_close({k: (parts[0][k] + parts[1][k]) / 2 for k in whole}, whole)


def test_requires_grad_comes_back_after_an_error(wan, disc, batch):
    d = disc()
    _, _, text, t, z, _ = batch()
    with pytest.raises(RuntimeError):
        generator_backward(wan(), d, Objective(), z[:, :3], text, t)
    assert all(p.requires_grad for p in d.parameters())


def test_a_step_moves_the_logits_the_right_way(wan, disc, batch):
    g, d = wan(seed=7), disc()
    real, _, text, t, z, _ = batch(4)
    before = generator_backward(g, d, Objective(), z, text, t)
    torch.optim.SGD(g.parameters(), lr=1e-2).step()
    assert generator_backward(g, d, Objective(), z, text, t)["g_loss"] < before["g_loss"]


# ---- the instrument


def test_the_verdict_counts_each_side_and_the_pairs():
    real, fake = torch.tensor([2.0, -1.0, 0.5, 0.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    found = {name: float(value) for name, value in verdict(real, fake).items()}
    assert found == {
        "right_real": (1 + 0 + 1 + 0.5) / 4,
        "right_fake": (0 + 1 + 0 + 0) / 4,
        "right_pairs": (1 + 1 + 0.5 + 0) / 4,
    }


def test_the_floor_is_a_ten_thousandth_of_a_smooth_penalty_and_more_where_rounding_rules():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 64, 4, 1, 6, 6, dtype=torch.float64)
    t, text = torch.rand(64, dtype=torch.float64), torch.zeros(64, 1, 2, dtype=torch.float64)
    weight = torch.randn(144, dtype=torch.float64)

    def smooth(x, t, text):
        return x.flatten(1) @ weight

    def rounded(x, t, text):
        return x.to(torch.bfloat16).double().flatten(1) @ weight

    penalty = approximate_penalty(smooth(x, t, text), smooth(x + 0.01 * noise, t, text))
    assert penalty_floor(smooth, x, t, text, noise, 0.01) == pytest.approx(1e-4 * penalty)
    assert penalty_floor(rounded, x, t, text, noise, 0.01) > 3e-3 * penalty
