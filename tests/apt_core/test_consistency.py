import pytest
import torch

from apt_core.errors import AptError
from apt_core.method.consistency import (
    ConsistencySettings,
    choose_intervals,
    consistency_backward,
    discrete_times,
)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(2)
    shape = (4, 4, 2, 4, 6)
    x, z = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return x, z, torch.randn(4, 5, 10, generator=g), torch.randn(1, 5, 10, generator=g)


def velocity(model, x, t, text):
    return model(x, 1000.0 * t, text, return_dict=False)[0]


def test_discrete_times():
    assert discrete_times(4, 1.0).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert discrete_times(2, 3.0).tolist() == [0, 0.75, 1]
    times = discrete_times(32, 24.0)
    assert len(times) == 33 and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
    for steps, shift in ((0, 1.0), (4, 0.0)):
        with pytest.raises(AptError):
            discrete_times(steps, shift)


@pytest.mark.parametrize(
    "kw", [{"steps": 0}, {"shift": -1}, {"fraction_at_final": -0.1}, {"fraction_at_final": 1.1}]
)
def test_settings_refuse(kw):
    with pytest.raises(AptError):
        ConsistencySettings(**kw)


@pytest.mark.parametrize("steps, fraction", [(5, 0.25), (5, 0.0), (5, 1.0), (1, 0.3), (2, 0.5)])
def test_interval_shares(steps, fraction):
    u = (torch.arange(10000) + 0.5) / 10000
    counts = torch.bincount(choose_intervals(u, steps, fraction), minlength=steps) / 10000
    final = 1.0 if steps == 1 else fraction
    assert counts[-1].item() == pytest.approx(final, abs=2e-4) and len(counts) == steps
    for share in counts[:-1].tolist():
        assert share == pytest.approx((1 - final) / (steps - 1), abs=2e-4)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("separate_target", [False, True])
def test_step_by_hand(double, wan, data, guidance, separate_target):
    student, teacher, ema = (wan(seed=seed).double() for seed in (1, 2, 3))
    x, z, text, negative = (value.double() for value in data)
    settings = ConsistencySettings(steps=4, shift=3.0, guidance=guidance, fraction_at_final=0.25)
    u = torch.tensor([0.1, 0.3, 0.6, 0.99])  # intervals 3 (the final one), 0, 1, 2
    metrics = consistency_backward(
        student,
        teacher,
        settings,
        x,
        z,
        text,
        negative,
        u,
        target=ema if separate_target else None,
        loss_scale=0.5,
    )
    got = {n: p.grad for n, p in student.named_parameters()}
    assert all(p.grad is None for m in (teacher, ema) for p in m.parameters())
    student.zero_grad()

    times = [3 * i / 4 / (1 + 2 * i / 4) for i in range(5)]
    t, s = (torch.tensor([times[n + k] for n in (3, 0, 1, 2)], dtype=torch.float64) for k in (1, 0))
    wide_t, wide_s = t.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)
    x_t = (1 - wide_t) * x + wide_t * z
    with torch.no_grad():
        v, v0 = velocity(teacher, x_t, t, text), velocity(teacher, x_t, t, negative.repeat(4, 1, 1))
        x_s = x_t - (wide_t - wide_s) * (v0 + guidance * (v - v0))
        wanted = x_s - wide_s * velocity(ema if separate_target else student, x_s, s, text)
    assert torch.equal(wanted[1], x_s[1])  # t_n = 0: the teacher's own point
    errors = (x_t - wide_t * velocity(student, x_t, t, text) - wanted).square().mean(dim=(1, 2, 3, 4))
    (0.5 * errors.mean()).backward()
    for name, p in student.named_parameters():
        assert torch.allclose(got[name], p.grad, atol=1e-10, rtol=1e-10), name
    assert metrics["cd_loss"].item() == pytest.approx(errors.mean().item(), rel=1e-10)
    assert metrics["cd_loss_final"].item() == pytest.approx(errors[0].item(), rel=1e-10)
    assert metrics["final_share"].item() == 0.25
    assert not any(v.requires_grad for v in metrics.values())


def test_boundary_ignores_the_target_network(wan, data):
    """In the lowest interval the target is the teacher's point, whatever the target network says there."""
    x, z, text, _ = data
    settings = ConsistencySettings(steps=4, guidance=1.0, fraction_at_final=0.0)
    results = []
    for seed in (5, 6):
        student = wan(seed=1)
        metrics = consistency_backward(
            student, wan(seed=2), settings, x, z, text, None, torch.zeros(4), target=wan(seed=seed)
        )
        assert metrics["cd_loss_final"] == 0 and metrics["final_share"] == 0
        results.append([metrics["cd_loss"]] + [p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_final_samples_start_from_pure_noise(wan, data):
    """At t = T the student sees z and 1000, as the one-step generator will."""
    x, z, text, _ = data
    student, seen = wan(seed=1), []
    student.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)
    settings = ConsistencySettings(steps=3, guidance=1.0, fraction_at_final=1.0)
    consistency_backward(student, wan(seed=2), settings, x, z, text, None, torch.rand(4), target=wan(seed=3))
    assert len(seen) == 1
    assert seen[0]["timestep"].tolist() == [1000.0] * 4
    assert torch.equal(seen[0]["hidden_states"], z)


def test_a_consistent_student_has_no_loss(data):
    """On the straight path of one data point the true velocity is (x_t - x) / t: teacher, student and target
    agree everywhere.
    """
    x, z, text, _ = data
    x = x[:1].expand_as(x).double()

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            t = (timestep / 1000).view(-1, 1, 1, 1, 1).clamp(min=1e-6)
            return ((hidden_states - x) / t + self.nothing,)

    metrics = consistency_backward(
        Exact(),
        Exact(),
        ConsistencySettings(steps=8, shift=5.0, guidance=1.0),
        x,
        z,
        text,
        None,
        torch.rand(4),
    )
    assert metrics["cd_loss"].item() < 1e-9


def test_guidance_needs_a_negative(wan, data):
    x, z, text, _ = data
    with pytest.raises(AptError, match="negative"):
        consistency_backward(wan(), wan(), ConsistencySettings(), x, z, text, None, torch.rand(4))
