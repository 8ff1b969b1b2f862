import copy

import pytest
import torch
from torch import nn

from apt_core.errors import AptError
from apt_core.method.ema import Ema


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(3, dtype=torch.float64), persistent=False)


def set_to(model, value):
    with torch.no_grad():
        model.w.fill_(value)
        model.mean.fill_(value)


def test_average_by_hand():
    model = Model()
    ema = Ema(model, 0.9)
    assert set(ema.shadow) == {"w", "mean"}
    expected = 0.0
    for value in (1.0, 2.0, -1.0):
        set_to(model, value)
        ema.update(model)
        expected = 0.9 * expected + 0.1 * value
        for name in ("w", "mean"):
            assert torch.allclose(ema.shadow[name], torch.full_like(ema.shadow[name], expected), atol=1e-7)
    assert ema.updates == 3


def test_only_update_counts():
    """Whatever happens between generator updates, the average moves with update() alone."""
    model = Model()
    ema, slow = Ema(model, 0.5), Ema(model, 0.995)
    set_to(model, 1.0)
    with ema.applied(model):
        pass
    ema.state_dict()
    assert ema.updates == 0 and not ema.shadow["w"].any()
    for _ in range(350):
        slow.update(model)
    assert slow.updates == 350
    assert slow.shadow["w"][0, 0].item() == pytest.approx(1 - 0.995**350, abs=1e-5)
    assert ema.updates == 0


def test_warmup():
    model = Model()
    ema, expected = Ema(model, 0.9, warmup=3), 0.0
    for n in range(1, 60):
        set_to(model, float(n))
        ema.update(model)
        d = min(0.9, n / (n + 3))
        expected = d * expected + (1 - d) * n
    assert ema.shadow["w"][0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_small_updates_are_not_lost():
    """A bf16 average at 0.995 would stand still here."""
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    ema, before = Ema(model, 0.995), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(5e-6)
    ema.update(model)
    assert (ema.shadow["weight"] != before).float().mean() > 0.5
    assert (ema.shadow["weight"] - before).mean().item() == pytest.approx(0.005 * 5e-6, rel=0.3)


def test_refuses_half_precision_and_bad_settings():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(AptError, match="1.weight is torch.bfloat16"):
        Ema(model, 0.9)
    for decay, warmup in ((1.0, 0), (-0.1, 0), (0.9, -1)):
        with pytest.raises(AptError):
            Ema(Model(), decay, warmup)


def test_copy_to_and_applied():
    model = Model()
    ema = Ema(model, 0.5)
    set_to(model, 1.0)
    ema.update(model)
    with ema.applied(model) as m:
        assert m is model and model.w[0, 0] == 0.5 and model.mean[0] == 0.5
    assert (model.w == 1).all() and (model.mean == 1).all()
    with pytest.raises(RuntimeError, match="sampling failed"):
        with ema.applied(model):
            raise RuntimeError("sampling failed")
    assert (model.w == 1).all()

    half = Model().bfloat16()
    ema.copy_to(half)
    assert (half.w == 0.5).all() and half.w.dtype == torch.bfloat16 and half.w.requires_grad
    ema.update(model)
    assert (half.w == 0.5).all()  # a copy, not a view


def test_resume_is_exact():
    model = Model()
    a, b = Ema(model, 0.9, 5), Ema(model, 0.9, 5)
    for value in (1.0, 3.0):
        set_to(model, value)
        a.update(model)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    set_to(model, -2.0)
    a.update(model)
    b.update(model)
    assert b.updates == 3 and all(torch.equal(a.shadow[n], b.shadow[n]) for n in a.shadow)


def test_loading_is_strict_and_names_the_keys():
    ema = Ema(Model(), 0.9)
    good = copy.deepcopy(ema.state_dict())
    good["shadow"]["w"].fill_(9)
    missing, unknown, shape = (copy.deepcopy(good) for _ in range(3))
    del missing["shadow"]["mean"]
    unknown["shadow"]["extra.weight"] = torch.zeros(1)
    shape["shadow"]["mean"] = torch.zeros(4)
    for state, message in (
        (missing, r"missing \['mean'\]"),
        (unknown, r"unknown \['extra.weight'\]"),
        (shape, "mean has shape"),
        ({}, "updates"),
    ):
        with pytest.raises(AptError, match=message):
            ema.load_state_dict(state)
    assert not ema.shadow["w"].any()  # nothing was half loaded
    other = nn.Linear(2, 2)
    for act in (ema.update, ema.copy_to):
        with pytest.raises(AptError, match="missing"):
            act(other)
    assert ema.updates == 0


def test_shadow_has_a_checkpoints_names(wan):
    model = wan()
    assert list(Ema(model, 0.9).shadow) == list(model.state_dict())
