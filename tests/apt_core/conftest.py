"""Tiny models for the tests of the library. Everything runs on one CPU thread."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import tiny_wan

from apt_core.method.discriminator import Discriminator


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double(monkeypatch):
    """Runs the models in fp64 although they ask for fp32 inside: what is left of a difference is then a
    mistake, not rounding.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def same(monkeypatch):
    """same(found, expected, compute): two models have the same weights to the last bit, and `compute` gives
    the same of both in fp64.

    Not to the last bit: kernels round by where in memory a weight lies, and what is read from a file may lie
    anywhere.
    """

    def check(found, expected, compute):
        state, wanted = found.state_dict(), expected.state_dict()
        assert state.keys() == wanted.keys()
        assert [
            name
            for name, value in state.items()
            if value.dtype != wanted[name].dtype or not torch.equal(value, wanted[name])
        ] == []
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            torch.testing.assert_close(
                *(compute(copy.deepcopy(model).double()) for model in (found, expected)), rtol=0, atol=1e-12
            )

    return check


@pytest.fixture
def wan():
    """Factory: wan(cls=WanBackbone, layers=3, seed=0, **configuration)."""
    return tiny_wan


@pytest.fixture
def stock():
    """Factory of the stock class with the same weights as wan() of that seed."""
    return lambda **kw: tiny_wan(WanTransformer3DModel, **kw)


@pytest.fixture
def disc():
    """Factory: disc(layers=3, seed=0, **Discriminator arguments)."""

    def make(layers=3, seed=0, **kw):
        backbone = tiny_wan(layers=layers, seed=seed)
        torch.manual_seed(seed + 100)
        return Discriminator(backbone, **kw)

    return make


@pytest.fixture
def batch():
    """Factory: real, fake, text, t, real_noise, fake_noise for the tiny models."""

    def make(n=2, seed=1):
        g = torch.Generator().manual_seed(seed)
        shape = (n, 4, 2, 4, 6)
        real, fake, real_noise, fake_noise = (torch.randn(shape, generator=g) for _ in range(4))
        return (
            real,
            fake,
            torch.randn(n, 5, 10, generator=g),
            torch.rand(n, generator=g),
            real_noise,
            fake_noise,
        )

    return make
