"""Ridge regression from sums against its definition, patches, and the split of an error by frequency."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from apt_core.errors import AptError
from apt_core.method.linear_probe import Ridge, band_energies
from apt_core.models.patches import from_patches, to_patches
from apt_core.models.wan import WanBackbone


def test_ridge_equals_its_normal_equations():
    g = torch.Generator().manual_seed(0)
    # far from zero, as a residual stream may be
    x = torch.randn(40, 5, generator=g, dtype=torch.float64) * torch.tensor([1, 2, 3, 4, 5]) + 100
    y = torch.randn(40, 3, generator=g, dtype=torch.float64) + x[:, :3]
    ridge = Ridge()
    for part in (slice(0, 7), slice(7, 33), slice(33, 40)):
        ridge.add(x[part], y[part])
    weight, bias = ridge.solve(0.1)
    penalty = 0.1 * (x - x.mean(0)).square().sum() / 5
    # With a column of ones for the bias, which the penalty leaves alone.
    ones = torch.cat([x, torch.ones(40, 1)], dim=1).double()
    expected = torch.linalg.solve(
        ones.T @ ones + torch.diag(torch.tensor([penalty] * 5 + [0.0], dtype=torch.float64)), ones.T @ y
    )
    torch.testing.assert_close(weight, expected[:5], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(bias, expected[5], rtol=1e-7, atol=1e-6)


def test_ridge_without_samples_or_penalty_is_refused():
    with pytest.raises(AptError, match="0 rows"):
        Ridge().solve()
    ridge = Ridge()
    ridge.add(torch.ones(2, 2), torch.ones(2, 1))
    with pytest.raises(AptError, match="penalty above 0"):
        ridge.solve(0.0)
    weight, bias = ridge.solve()  # inputs that never change tell nothing: the bias says it all
    assert torch.equal(weight, torch.zeros(2, 1, dtype=torch.float64)) and bias.item() == 1


def test_patches_are_what_the_backbone_makes_tokens_of(wan):
    model: WanBackbone = wan()
    x = torch.randn(2, 4, 2, 4, 6)
    patches = to_patches(x, (1, 2, 2))
    tokens = model.patch_embedding(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        patches @ model.patch_embedding.weight.flatten(1).T + model.patch_embedding.bias,
        tokens,
        rtol=1e-5,
        atol=1e-5,
    )
    assert torch.equal(from_patches(patches, (1, 2, 2), x.shape[2:]), x)


def test_bands_add_up_and_are_those_of_the_cosine_transform():
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    low, high = band_energies(x, 1 / 3)
    assert low + high == pytest.approx(x.double().square().sum().item(), rel=1e-12)
    spectrum = dctn(x.double().numpy(), axes=(2, 3), norm="ortho") ** 2
    radius = np.hypot(np.arange(6)[:, None] / 6, np.arange(8)[None] / 8)
    assert low == pytest.approx(spectrum[..., radius < 1 / 3].sum(), rel=1e-12)
    flat, chequers = (
        torch.ones(1, 6, 6),
        (torch.arange(6)[:, None] + torch.arange(6)[None]).remainder(2)[None] * 2.0 - 1,
    )
    assert band_energies(flat) == pytest.approx((36, 0), abs=1e-12)
    assert band_energies(chequers)[0] < 0.1 * 36
