import pytest
import torch

from apt_core.errors import AptError
from apt_core.method.flow import (
    clean_from_velocity,
    interpolate,
    sample_noise,
    sample_uniform,
    shift,
    velocity,
)


def test_path_by_hand():
    x, z = torch.tensor([[2.0, 4.0], [2.0, 4.0]]), torch.tensor([[10.0, 0.0], [10.0, 0.0]])
    assert interpolate(x, z, torch.tensor([0.25, 1.0])).tolist() == [[4.0, 3.0], [10.0, 0.0]]
    assert velocity(x, z).tolist() == [[8.0, -4.0]] * 2
    assert torch.equal(interpolate(x, z, 0.0), x)


def test_clean_from_velocity_inverts_the_path():
    x, z, t = torch.randn(4, 3, 2, 2, 2), torch.randn(4, 3, 2, 2, 2), torch.tensor([0.0, 0.3, 0.7, 1.0])
    x_t = interpolate(x, z, t)
    assert torch.allclose(clean_from_velocity(x_t, velocity(x, z), t), x, atol=1e-6)
    assert torch.equal(clean_from_velocity(x_t, torch.randn_like(x), torch.zeros(4)), x_t)


def test_time_must_be_one_per_sample():
    with pytest.raises(AptError, match=r"needs shape \(2,\)"):
        interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize(
    "s, t, expected",
    [(12, 0.5, 12 / 13), (12, 0.1, 1.2 / 2.1), (1, 0.37, 0.37), (3, 0.25, 0.5), (0.5, 0.5, 1 / 3)],
)
def test_shift_is_equation_7(s, t, expected):
    assert shift(t, s) == pytest.approx(expected, abs=1e-12)
    assert float(shift(torch.tensor([t]), s)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("s", [0.1, 0.3, 1, 3.1, 12, 17.3])
def test_shift_keeps_the_ends_exactly_and_is_monotone(s):
    t = torch.linspace(0, 1, 101)
    shifted = shift(t, s)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert torch.allclose(shifted, s * t / (1 + (s - 1) * t), atol=1e-6)


@pytest.mark.parametrize(
    "t, s", [(1.001, 3), (-0.1, 3), (700.0, 12), (float("nan"), 3), (0.5, 0), (0.5, -1), (0.5, float("nan"))]
)
def test_shift_refuses(t, s):
    for value in (t, torch.tensor([0.5, t])):
        with pytest.raises(AptError):
            shift(value, s)


def test_randomness_depends_on_seed_stream_and_index_only():
    whole = sample_noise(range(10), (4, 2, 3), 7, "z")
    assert whole.shape == (10, 4, 2, 3) and whole.dtype == torch.float32
    two_ranks = torch.empty_like(whole)
    two_ranks[0::2] = sample_noise(range(0, 10, 2), (4, 2, 3), 7, "z")
    two_ranks[1::2] = sample_noise(torch.arange(1, 10, 2), (4, 2, 3), 7, "z")
    assert torch.equal(whole, two_ranks)
    torch.manual_seed(123)
    assert torch.equal(whole[6:], sample_noise(range(6, 10), (4, 2, 3), 7, "z"))
    u = sample_uniform(range(100), 7, "t")
    assert torch.equal(u[40:60], sample_uniform(range(40, 60), 7, "t"))
    for seed, stream, start in ((8, "z", 0), (7, "r1", 0), (7, "z", 10)):
        assert not torch.isclose(whole, sample_noise(range(start, start + 10), (4, 2, 3), seed, stream)).any()


def test_randomness_does_not_touch_the_global_state():
    before = torch.get_rng_state()
    sample_noise([0], (3,), 0, "z")
    sample_uniform([0], 0, "t")
    assert torch.equal(before, torch.get_rng_state())


def test_randomness_has_the_right_distribution():
    noise = sample_noise(range(2000), (10,), 0, "z")
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1]) < 0.07
    u = sample_uniform(range(4000), 0, "t")
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.004


def test_large_seeds_and_indices_do_not_collide():
    a = sample_noise([1], (8,), 1, "z")
    assert not torch.equal(a, sample_noise([1 + 2**32], (8,), 1, "z"))
    assert not torch.equal(a, sample_noise([1], (8,), 1 + 2**32, "z"))
