"""aR1 with a sigma of its own in time: the variance of each part, and what each of them penalises."""

import pytest
import torch

from apt_core.errors import AptError
from apt_core.method.objectives import (
    MODES,
    Objective,
    discriminator_backward,
    penalty_floor,
    perturbation,
)

SPACE, TIME = 0.01, 0.1  # V-PAE's


def noise_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Linear(torch.nn.Module):
    """A discriminator whose gradient is known: `D(x) = <g, x>`; and what it was asked."""

    def __init__(self, g):
        super().__init__()
        self.g, self.calls = torch.nn.Parameter(g), []

    def forward(self, x, t, text):
        self.calls.append(x.detach())
        return (x * self.g).flatten(1).sum(1)


@pytest.mark.parametrize("frames", [2, 5])
def test_variance_of_each_part(frames):
    """200,000 numbers of a frame: their variance is known to a third of a percent (root of 2 / n)."""
    added = perturbation(noise_of(20, 100, frames, 10, 10), SPACE, TIME)
    shared = added.mean(dim=2, keepdim=True)
    between = added - shared
    assert shared.square().mean() == pytest.approx(SPACE**2 / frames, rel=0.02)
    assert between.square().mean() == pytest.approx(TIME**2 * (1 - 1 / frames), rel=0.02)
    assert between.sum(dim=2).abs().max() < 1e-14 and abs((shared * between).mean()) < 1e-9 * TIME
    # from one frame to the next the shared part is gone: twice the variance in time, nothing of space
    assert added.diff(dim=2).square().mean() == pytest.approx(2 * TIME**2, rel=0.02)


def test_off_is_the_papers_bit_for_bit_and_equal_sigmas_are_one():
    noise = noise_of(3, 4, 5, 6, 6).float()
    assert torch.equal(perturbation(noise, 0.3), 0.3 * noise)
    wide = noise.double()
    torch.testing.assert_close(perturbation(wide, 0.3, 0.3), 0.3 * wide, rtol=0, atol=1e-15)
    image = wide[:, :, :1]
    assert torch.equal(perturbation(image, 0.3, 7.0), 0.3 * image)  # no part in time
    assert not torch.allclose(perturbation(wide, 0.3, 0.7), 0.3 * wide)


@pytest.mark.parametrize("mode", MODES)
def test_each_sigma_penalises_its_own_part_of_the_gradient(mode):
    """A logit that all frames change alike feels sigma, one that differences between frames change feels
    sigma in time; the penalty is what a hand makes of the noise."""
    n, shape = 6, (3, 4, 2, 2)
    x, fake, noise = noise_of(n, *shape), noise_of(n, *shape) + 1, noise_of(n, *shape).flip(0)
    t, text = torch.rand(n, dtype=torch.float64), torch.zeros(n, 1, 1, dtype=torch.float64)
    g = noise_of(*shape)
    alike = g.mean(dim=1, keepdim=True).expand(shape)

    def found(gradient, sigma, time):
        o = Objective(
            r1_weight=2.0,
            r1_sigma=sigma,
            r1_sigma_time=time,
            r2_weight=3.0,
            r2_sigma=time,
            r2_sigma_time=sigma,
        )
        step = discriminator_backward(Linear(gradient), o, x, fake, text, t, noise, noise, mode)
        return step["r1"].item(), step["r2"].item()

    def by_hand(gradient, scale):
        return ((scale * noise * gradient).flatten(1).sum(1)).square().mean().item()

    for part, r1, r2 in ((alike, SPACE, TIME), (g - alike, TIME, SPACE)):
        assert found(part, SPACE, TIME) == pytest.approx((by_hand(part, r1), by_hand(part, r2)), rel=1e-9)
    whole = (noise * (SPACE * alike + TIME * (g - alike))).flatten(1).sum(1).square().mean().item()
    assert found(g, SPACE, TIME)[0] == pytest.approx(whole, rel=1e-9)
    step = discriminator_backward(Linear(g), Objective(r1_sigma=SPACE), x, fake, text, t, noise, mode=mode)
    assert step["r1"].item() == pytest.approx(by_hand(g, SPACE), rel=1e-9)


def test_the_perturbed_samples_are_what_the_discriminator_sees():
    x, fake, noise = (noise_of(4, 3, 4, 2, 2) + k for k in range(3))
    t, text, spy = torch.rand(4, dtype=torch.float64), torch.zeros(4, 1, 1), Linear(noise_of(3, 4, 2, 2))
    o = Objective(r1_sigma=SPACE, r1_sigma_time=TIME, reg_fraction=0.5)
    discriminator_backward(spy, o, x, fake, text, t, noise)
    shared = noise[:2].mean(2, keepdim=True)
    assert len(spy.calls) == 3
    assert torch.equal(spy.calls[2], x[:2] + (SPACE * shared + TIME * (noise[:2] - shared)))


def test_what_is_reported_and_the_floor():
    assert Objective.paper("video").gammas() == {"r1_gamma": pytest.approx(1.0)}
    o = Objective(r1_sigma=SPACE, r1_sigma_time=TIME, r2_weight=4.0, r2_sigma=0.5)
    gammas = {
        "r1_gamma": pytest.approx(0.01),
        "r1_gamma_time": pytest.approx(1.0),
        "r2_gamma": pytest.approx(1.0),
    }
    assert o.gammas() == gammas
    x, noise = noise_of(4, 3, 4, 2, 2), noise_of(4, 3, 4, 2, 2).flip(0)
    t, text, d = torch.rand(4, dtype=torch.float64), torch.zeros(4, 1, 1), Linear(noise_of(3, 4, 2, 2))
    step = discriminator_backward(d, o, x, x + 1, text, t, noise, noise)
    assert {name: step[name].item() for name in gammas} == gammas
    # a linear discriminator has no rounding worth the name: a ten-thousandth, of both parts
    floor = penalty_floor(d, x, t, text, noise, SPACE, TIME)
    assert floor.item() == pytest.approx(1e-4 * step["r1"].item(), rel=1e-6)
    with pytest.raises(AptError, match=r"^r1_sigma_time must be above 0 where r1_weight is, got 0\.0\.$"):
        Objective(r1_sigma_time=0.0)
