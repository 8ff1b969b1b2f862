import copy

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from apt_core.errors import AptError
from apt_core.method import optim
from apt_core.method.optim import RMSProp, make_rmsprop, step_in_turn


def models(n=2):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return [first] + [copy.deepcopy(first) for _ in range(n - 1)]


def step(model, optimizer, i):
    g = torch.Generator().manual_seed(i)
    optimizer.zero_grad()
    x = torch.randn(5, 6, generator=g, dtype=torch.float64)
    (model(x) - torch.randn(5, 3, generator=g, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_bias_corrected_is_adam_with_betas_0_and_09(eps):
    a, b = models()
    ours, adam = (
        make_rmsprop(a.parameters(), 1e-3, eps=eps),
        torch.optim.Adam(b.parameters(), 1e-3, betas=(0.0, 0.9), eps=eps),
    )
    for i in range(50):
        lr = 1e-3 * min(1, (i + 1) / 10)  # a warm-up from outside
        ours.param_groups[0]["lr"] = adam.param_groups[0]["lr"] = lr
        step(a, ours, i)
        step(b, adam, i)
        assert ours.param_groups[0]["lr"] == lr and ours.param_groups[0]["eps"] == eps
        assert distance(a, b) < 1e-12


def test_fp32_is_adam_to_1e_7():
    a, b = (m.float() for m in models())
    ours, adam = make_rmsprop(a.parameters(), 1e-4), torch.optim.Adam(b.parameters(), 1e-4, betas=(0.0, 0.9))
    for i in range(50):
        for m, o in ((a, ours), (b, adam)):
            o.zero_grad()
            m(torch.randn(5, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            o.step()
    assert distance(a, b) < 1e-7


def test_without_correction_it_is_torchs_and_starts_larger():
    a, b, c = models(3)
    plain = make_rmsprop(a.parameters(), 1e-3, bias_correction=False)
    torchs = torch.optim.RMSprop(b.parameters(), 1e-3, alpha=0.9)
    corrected = make_rmsprop(c.parameters(), 1e-3)
    start = copy.deepcopy(a)
    step(c, corrected, 0)
    for i in range(3):
        step(a, plain, i)
        step(b, torchs, i)
        if i == 0:
            assert distance(a, start) / distance(c, start) == pytest.approx(10**0.5, rel=1e-3)
    assert distance(a, b) == 0


def test_resume_goes_on_counting():
    a, b = models()
    one = make_rmsprop(a.parameters(), 1e-3)
    for i in range(3):
        step(a, one, i)
    b.load_state_dict(a.state_dict())
    two = make_rmsprop(b.parameters(), 1e-3)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for i in range(3, 8):
        step(a, one, i)
        step(b, two, i)
    assert distance(a, b) == 0


def test_a_group_added_later_starts_its_own_count():
    a, b = models()
    ours, adam = (
        make_rmsprop(a[0].parameters(), 1e-3),
        torch.optim.Adam(b[0].parameters(), 1e-3, betas=(0.0, 0.9)),
    )
    for i in range(8):
        if i == 4:
            ours.add_param_group({"params": list(a[2].parameters()), "lr": 2e-3})
            adam.add_param_group({"params": list(b[2].parameters()), "lr": 2e-3})
        step(a, ours, i)
        step(b, adam, i)
        a.zero_grad(), b.zero_grad()
    assert distance(a, b) < 1e-12


def test_closure_and_missing_gradients():
    a, _ = models()
    optimizer = make_rmsprop(a.parameters(), 1e-3)
    optimizer.step()  # nothing has a gradient yet
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


def test_settings_survive_an_error_in_the_step(monkeypatch):
    a, _ = models()
    optimizer = make_rmsprop(a.parameters(), 1e-3)
    monkeypatch.setattr(torch.optim.RMSprop, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["eps"] == 1e-8


def test_fp32_weights_move_and_bf16_weights_do_not():
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        w = nn.Parameter((0.02 * torch.randn(20000)).to(dtype))
        before = w.detach().clone()
        w.grad = torch.randn(20000).to(dtype)
        RMSProp([w], lr=3e-6).step()
        moved[dtype] = (w != before).float().mean().item()
    assert moved[torch.float32] > 0.95
    assert moved[torch.bfloat16] < 0.2


def test_bf16_weights_are_refused():
    with pytest.raises(AptError, match="bfloat16"):
        make_rmsprop([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-3)


@pytest.mark.parametrize("kind", ["rmsprop", "adam"])
def test_a_large_optimizer_steps_one_tensor_after_the_other(kind, monkeypatch):
    """To the same weights, and without a second copy of its state: torch's foreach kernels make one."""

    def make(network):
        if kind == "rmsprop":
            return make_rmsprop(network.parameters(), 1e-3)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, foreach=True)
        step_in_turn(optimizer)
        return optimizer

    torch.manual_seed(0)
    small = nn.Sequential(*(nn.Linear(64, 64, dtype=torch.float64) for _ in range(8)))
    large = copy.deepcopy(small)
    whole, largest = sum(p.nbytes for p in small.parameters()), 64 * 64 * 8
    more = {}
    for name, network, limit in (("small", small, whole), ("large", large, whole - 1)):
        monkeypatch.setattr(optim, "FOREACH_BYTES", limit)
        optimizer = make(network)
        for i in range(5):
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
            with LiveBytes() as live:
                optimizer.step()
        more[name] = live.peak
    assert whole <= more["small"] and largest <= more["large"] < 4 * largest
    assert distance(small, large) < 1e-15
