"""Distribution matching against closed forms: between Gaussians all scores, and the divergence, are known."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from apt_core.errors import AptError
from apt_core.method.dmd import (
    DmdSettings,
    dmd_backward,
    fake_backward,
    matching_gradient,
    noise_times,
    score,
)
from apt_core.models.lora import add_adapters, role

D = 2


class Affine(nn.Module):
    """A one-step generator whose samples are `mean + factor z`, called like a backbone."""

    def __init__(self, mean, factor):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        assert (timestep == 1000).all()
        return (hidden_states - (self.mean + hidden_states @ self.factor.T),)

    def density(self, t):
        """Of its samples, noised to time t."""
        return noised(self.mean, self.factor @ self.factor.T, t)


class Exact(nn.Module):
    """The velocity field of a Gaussian: `E[noise - x | x_t]`, from the conditional mean of x."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.covariance = mean.detach(), covariance.detach()

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        t = timestep[0] / 1000
        density = noised(self.mean, self.covariance, t)
        gain = (1 - t) * self.covariance @ density.precision_matrix
        x = self.mean + (hidden_states - density.mean) @ gain.T
        return ((hidden_states - x) / t,)


def noised(mean, covariance, t):
    return MultivariateNormal((1 - t) * mean, (1 - t) ** 2 * covariance + t**2 * torch.eye(D).double())


def exact_moments():
    """z and noise [8, 2] each, whose means, variances and covariances are those of the normal distribution:
    what is quadratic in them has its expectation without an error of sampling.
    """
    both = 2.0 * torch.cat([torch.eye(2 * D), -torch.eye(2 * D)]).double()
    return both[:, :D], both[:, D:]


GENERATOR = ([0.3, -1.0], [[0.8, 0.0], [0.5, 1.4]])
REAL = (torch.tensor([1.0, 0.5]).double(), torch.tensor([[0.5, 0.2], [0.2, 1.5]]).double())
NO_TEXT = torch.zeros(8, 1, 1).double()


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_the_score_is_that_of_a_gaussian(t):
    x_t = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    density = noised(*REAL, t)
    (wanted,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    v = Exact(*REAL)(x_t, torch.full((6,), 1000 * t, dtype=torch.float64), None, False)[0]
    torch.testing.assert_close(
        score(x_t, v, torch.full((6,), t, dtype=torch.float64)), wanted, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("t", [0.05, 0.4, 0.8])
def test_the_gradient_is_that_of_the_divergence_of_noised_gaussians(double, t):
    generator, (z, noise) = Affine(*GENERATOR), exact_moments()
    fake = Exact(generator.mean, generator.factor @ generator.factor.T)
    settings = DmdSettings(guidance=1.0, weighting="kl")
    times = torch.full((8,), t, dtype=torch.float64)
    dmd_backward(generator, Exact(*REAL), fake, settings, z, NO_TEXT, None, noise, times, loss_scale=0.5)
    found = [p.grad for p in generator.parameters()]
    wanted = torch.autograd.grad(
        kl_divergence(generator.density(t), noised(*REAL, t)), list(generator.parameters())
    )
    assert all(value.abs().max() > 1e-3 for value in wanted)
    for value, expected in zip(found, wanted):  # a mean over D elements, of half a batch's share
        torch.testing.assert_close(value, 0.5 * expected / D, rtol=1e-9, atol=1e-11)


def test_dmds_weighting_is_the_same_direction(double):
    g = torch.Generator().manual_seed(1)
    x, noise, v_real, v_fake = (torch.randn(3, 4, 2, generator=g).double() for _ in range(4))
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    wide = t.view(-1, 1, 1)
    x_t = (1 - wide) * x + wide * noise
    by_dmd = matching_gradient(x, x_t, v_real, v_fake, t)
    by_kl = matching_gradient(x, x_t, v_real, v_fake, t, "kl")
    real, fake = x_t - wide * v_real, x_t - wide * v_fake
    distance = (real - x).abs().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(by_dmd, (fake - real) / distance)
    torch.testing.assert_close(by_kl, by_dmd * distance * ((1 - wide) / wide) ** 2)


def test_equal_scores_give_no_gradient(double):
    generator, (z, noise) = Affine(*GENERATOR), exact_moments()
    for weighting in ("dmd", "kl"):
        metrics = dmd_backward(
            generator,
            Exact(*REAL),
            Exact(*REAL),
            DmdSettings(guidance=1.0, weighting=weighting),
            z,
            NO_TEXT,
            None,
            noise,
            torch.full((8,), 0.5, dtype=torch.float64),
        )
        assert metrics["gap"] == metrics["grad_norm"] == 0 and metrics["real_distance"] > 0.1
        assert all((p.grad == 0).all() for p in generator.parameters())


class Linear(nn.Module):
    """A velocity that is affine in x_t, for one time alone."""

    def __init__(self, mean, covariance, t):
        super().__init__()
        exact, ones = Exact(mean, covariance), torch.full((1,), 1000 * t, dtype=torch.float64)
        offset = exact(torch.zeros(1, D).double(), ones, None, False)[0]
        columns = exact(torch.eye(D).double(), ones, None, False)[0] - offset
        self.offset, self.slope = nn.Parameter(offset[0]), nn.Parameter(columns.T.contiguous())

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        return (self.offset + hidden_states @ self.slope.T,)


def test_the_fake_score_rests_at_the_generators_own_velocity_and_nowhere_else(double):
    generator, (z, noise), t = Affine(*GENERATOR), exact_moments(), 0.4
    own = Linear(generator.mean, generator.factor @ generator.factor.T, t)
    times = torch.full((8,), t, dtype=torch.float64)
    fake_backward(own, generator, z, NO_TEXT, noise, times)
    assert all(p.grad.abs().max() < 1e-12 for p in own.parameters())
    other = Linear(*REAL, t)
    metrics = fake_backward(other, generator, z, NO_TEXT, noise, times)
    assert all(p.grad.abs().max() > 0.1 for p in other.parameters()) and metrics["fake_loss"] > 0.1
    assert all(p.grad is None for p in generator.parameters())


def test_two_networks_in_turn_bring_a_gaussian_onto_the_bases(double):
    """The whole method at one noise level, where the fake score's family holds the truth. It starts as the
    base's score, as a LoRA does.
    """
    generator, (z, noise), t = Affine(*GENERATOR), exact_moments(), 0.3
    fake, settings = Linear(*REAL, t), DmdSettings(guidance=1.0, weighting="kl")
    optimizers = [torch.optim.Adam(fake.parameters(), 0.05), torch.optim.Adam(generator.parameters(), 0.01)]
    times = torch.full((8,), t, dtype=torch.float64)
    for _ in range(400):
        for _ in range(2):
            fake_backward(fake, generator, z, NO_TEXT, noise, times)
            optimizers[0].step()
            optimizers[0].zero_grad()
        dmd_backward(generator, Exact(*REAL), fake, settings, z, NO_TEXT, None, noise, times)
        optimizers[1].step()
        optimizers[1].zero_grad()
    mean, covariance = generator.mean.detach(), (generator.factor @ generator.factor.T).detach()
    torch.testing.assert_close(mean, REAL[0], rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, REAL[1], rtol=0, atol=0.02)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(2)
    shape = (4, 4, 2, 4, 6)
    z, noise, wanted = (torch.randn(shape, generator=g).double() for _ in range(3))
    text, negative = (torch.randn(n, 5, 10, generator=g).double() for n in (4, 1))
    return z, noise, wanted, text, negative, torch.tensor([0.1, 0.3, 0.6, 0.99]).double()


def velocity(model, x, t, text):
    return model(x, 1000.0 * t, text, return_dict=False)[0]


@pytest.mark.parametrize("regression", [0.0, 0.25])
def test_step_by_hand(double, wan, data, regression):
    """As the gradient of a loss: half the squared distance to a target that lies one gradient away."""
    generator, real, fake = (wan(seed=seed).double() for seed in (1, 2, 3))
    z, noise, wanted, text, negative, t = data
    settings = DmdSettings(guidance=5.0, regression=regression)
    metrics = dmd_backward(
        generator, real, fake, settings, z, text, negative, noise, t, wanted, loss_scale=0.5
    )
    found = {name: p.grad for name, p in generator.named_parameters()}
    assert all(p.grad is None for network in (real, fake) for p in network.parameters())
    generator.zero_grad()

    x = z - velocity(generator, z, torch.ones(4).double(), text)
    wide = t.view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        x_t = (1 - wide) * x + wide * noise
        v, v0 = velocity(real, x_t, t, text), velocity(real, x_t, t, negative.repeat(4, 1, 1))
        x_real = x_t - wide * (v0 + 5.0 * (v - v0))
        x_fake = x_t - wide * velocity(fake, x_t, t, text)
        distance = (x - x_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        target = x - (x_fake - x_real) / distance
    loss = 0.5 * (x - target).square().mean() + regression * (x - wanted).square().mean()
    (own,) = torch.autograd.grad(loss, x, retain_graph=True)
    (0.5 * loss).backward()
    for name, p in generator.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert metrics["gap"].item() == pytest.approx((x_fake - x_real).abs().mean().item(), rel=1e-6)
    assert metrics["real_distance"].item() == pytest.approx(distance.mean().item(), rel=1e-6)
    assert metrics["grad_norm"].item() == pytest.approx(
        4 * own.flatten(1).norm(dim=1).mean().item(), rel=1e-6
    )
    assert ("regression_loss" in metrics) == (regression > 0)
    assert not any(value.requires_grad for value in metrics.values())


def test_roles_of_one_base_learn_apart_and_leave_it_as_it_was(wan, data):
    """Real score, fake score and generator on one set of weights: each step moves the adapters of its own
    role, and no bit of the base.
    """
    base = wan(seed=1)
    before = copy.deepcopy(base.state_dict())
    add_adapters(base, ["generator", "fake"], rank=2)
    generator, real, fake = role(base, "generator"), role(base, None), role(base, "fake")
    z, noise, _, text, _, t = (value.float() for value in data)
    settings = DmdSettings(guidance=1.0)
    metrics = dmd_backward(generator, real, fake, settings, z, text, None, noise, t)
    assert metrics["gap"] < 1e-6  # adapters are zero at first: the two scores are one
    generator.zero_grad()
    optimizers = [torch.optim.AdamW(network.parameters(), 1e-2) for network in (fake, generator)]
    for _ in range(3):
        fake_backward(fake, generator, z, text, noise, t)
        assert all(p.grad is not None for p in fake.parameters())
        assert all(p.grad is None for p in generator.parameters())
        optimizers[0].step()
        optimizers[0].zero_grad()
        metrics = dmd_backward(generator, real, fake, settings, z, text, None, noise, t)
        assert all(p.grad is not None for p in generator.parameters())
        assert all(p.grad is None for p in fake.parameters()) and metrics["gap"] > 1e-4
        optimizers[1].step()
        optimizers[1].zero_grad()
    after = base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.abs().max() > 0 for name, p in fake.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("t_min, t_max, s", [(0.02, 0.98, 1.0), (0.02, 0.98, 5.0), (0.9, 1.0, 3.0)])
def test_times_are_the_shifted_uniform_ones_of_their_range(t_min, t_max, s):
    u = (torch.arange(20000) + 0.5) / 20000
    t = noise_times(u, DmdSettings(t_min, t_max, s))
    assert t.min() >= t_min and t.max() <= t_max and (t.diff() >= 0).all()
    everything = s * u / (1 + (s - 1) * u)
    inside = everything[(everything >= t_min) & (everything <= t_max)]
    for q in (0.1, 0.5, 0.9):
        assert float(t.quantile(q)) == pytest.approx(float(inside.quantile(q)), abs=2e-3)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"t_min": 0.0}, "0 < t_min <= t_max <= 1, got 0.0 and 0.98"),
        ({"t_min": 0.5, "t_max": 0.4}, "got 0.5 and 0.4"),
        ({"t_max": 1.1}, "got 0.02 and 1.1"),
        ({"shift": 0.0}, "shift must be above 0, got 0.0"),
        ({"weighting": "vsd"}, "weighting must be 'dmd' or 'kl', got 'vsd'"),
        ({"regression": -1.0}, "regression must not be negative, got -1.0"),
    ],
)
def test_settings_refuse(given, sentence):
    with pytest.raises(AptError) as error:
        DmdSettings(**given)
    assert sentence in str(error.value)


def test_what_is_missing_is_named(wan, data):
    z, noise, _, text, _, t = (value.float() for value in data)
    model = wan()
    with pytest.raises(AptError, match="guidance of scale 7.5 needs the embedding of a negative prompt"):
        dmd_backward(model, model, model, DmdSettings(), z, text, None, noise, t)
    with pytest.raises(AptError, match="a regression of weight 0.5 needs the teacher's samples"):
        settings = DmdSettings(guidance=1.0, regression=0.5)
        dmd_backward(model, model, model, settings, z, text, None, noise, t)
