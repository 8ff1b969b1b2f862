"""The choice of attention kernels, and its reach."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from apt_core import attention
from apt_core.attention import attend, best_backend
from apt_core.mmdit import MMDiTBackbone


@pytest.mark.parametrize(
    "generation, installed, dtype, head_dim, expected",
    [
        (9, {"fa2", "fa3"}, torch.bfloat16, 128, "_flash_3"),
        (9, {"fa2"}, torch.bfloat16, 104, "_native_cudnn"),
        (10, {"fa2", "fa3"}, torch.bfloat16, 128, "_native_cudnn"),  # FlashAttention 3 is for Hopper alone
        (8, {"fa2", "fa3"}, torch.float16, 128, "flash"),
        (8, set(), torch.bfloat16, 128, "native"),
        (7, {"fa2"}, torch.float16, 128, "native"),
        (9, {"fa2", "fa3"}, torch.float32, 128, "native"),
        (9, {"fa2", "fa3"}, torch.bfloat16, 12, "native"),
    ],
)
def test_best_backend(monkeypatch, generation, installed, dtype, head_dim, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    for name, package in (("flash_attn_func", "fa2"), ("flash_attn_3_func", "fa3")):  # None where a package is missing or does not load
        monkeypatch.setattr(attention.attention_dispatch, name, print if package in installed else None)
    assert best_backend("cuda:0", dtype, head_dim) == expected
    assert AttentionBackendName(expected)
    assert best_backend("cpu", dtype, head_dim) == "native"


def test_attend_is_softmax_attention():
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (4, 5, 5))
    weights = (torch.einsum("bmhc,bnhc->bhmn", q, k) * 8**-0.5).softmax(dim=3)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhmn,bnhc->bmhc", weights, v), rtol=0, atol=1e-12)


def test_a_models_backend_is_its_own(wan, batch, monkeypatch):
    """Each model's calls reach its own backend, and the process's default is left alone."""
    called = []
    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        kernel = _AttentionBackendRegistry._backends[name]

        def counted(query, key, value, name=name.value, kernel=kernel, **kwargs):
            called.append(name)
            return kernel(query, key, value)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)
    x, _, text, t, *_ = batch()
    mmdit = MMDiTBackbone(num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, axes_dims_rope=(4, 4, 4))
    for model, calls in ((wan(layers=2), 4), (mmdit, 2)):
        before = model(x, 1000 * t, text, return_dict=False)[0]
        assert called == ["native"] * calls
        called.clear()
        model.use_attention("_native_math")
        torch.testing.assert_close(model(x, 1000 * t, text, return_dict=False)[0], before, rtol=0, atol=1e-5)
        assert called == ["_native_math"] * calls
        called.clear()
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
