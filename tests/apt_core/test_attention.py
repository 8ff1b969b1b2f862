"""The choice of attention kernels, and its reach."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_models import tiny_mmdit

from apt_core.errors import AptError
from apt_core.models import attention
from apt_core.models.attention import attend, best_backend, choose_backend


@pytest.fixture
def machine(monkeypatch):
    """machine(generation, installed): a card of compute capability `generation`.0, and packages of
    FlashAttention 2 and 3.
    """

    def be(generation: int, installed: set[str]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        # None where a package is missing or does not load
        for name, package in (
            ("flash_attn_func", "fa2"),
            ("flash_attn_3_func", "fa3"),
        ):
            monkeypatch.setattr(attention.attention_dispatch, name, print if package in installed else None)

    return be


@pytest.mark.parametrize(
    "generation, installed, dtype, head_dim, expected, training",
    [
        (9, {"fa2", "fa3"}, torch.bfloat16, 128, "_flash_3", "flash"),
        (9, {"fa3"}, torch.bfloat16, 128, "_flash_3", "_native_cudnn"),
        (9, {"fa2"}, torch.bfloat16, 104, "flash", "flash"),
        (9, set(), torch.bfloat16, 128, "_native_cudnn", "_native_cudnn"),
        (
            10,
            {"fa2", "fa3"},
            torch.bfloat16,
            128,
            "_native_cudnn",
            "_native_cudnn",
        ),  # FlashAttention 3 is for Hopper alone
        (12, {"fa2"}, torch.bfloat16, 128, "_native_cudnn", "_native_cudnn"),
        (8, {"fa2", "fa3"}, torch.float16, 128, "flash", "flash"),
        (8, set(), torch.bfloat16, 128, "native", "native"),
        (7, {"fa2"}, torch.float16, 128, "native", "native"),
        (9, {"fa2", "fa3"}, torch.float32, 128, "native", "native"),
        (9, {"fa2", "fa3"}, torch.bfloat16, 12, "native", "native"),
    ],
)
def test_best_backend(machine, generation, installed, dtype, head_dim, expected, training):
    machine(generation, installed)
    assert (
        best_backend("cuda:0", dtype, head_dim)
        == choose_backend("auto", "cuda:0", dtype, head_dim).name
        == expected
    )
    assert best_backend("cuda:0", dtype, head_dim, training=True) == training
    assert AttentionBackendName(expected)
    assert (
        best_backend("cpu", dtype, head_dim)
        == best_backend("cpu", dtype, head_dim, training=True)
        == "native"
    )


def test_what_has_no_backward_pass_is_said_and_the_next_taken(machine):
    def chosen(wanted: str | None, training: bool = True) -> str:
        return str(choose_backend(wanted, "cuda", torch.bfloat16, training=training))

    machine(9, {"fa2", "fa3"})
    assert [chosen("_flash_3"), chosen(None), chosen("auto")] == ["flash (_flash_3 has no backward pass)"] * 3
    assert [chosen(name, training=False) for name in ("_flash_3", "auto", "flash")] == [
        "_flash_3",
        "_flash_3",
        "flash",
    ]
    machine(9, {"fa2"})
    assert [chosen(name) for name in ("auto", "flash", "_native_cudnn", "native")] == [
        "flash",
        "flash",
        "_native_cudnn",
        "native",
    ]
    machine(8, set())
    assert chosen("auto") == "native"


def test_diffusers_flash_3_has_no_backward_pass():
    """Where it gets one, FORWARD_ONLY can go: an operator of torch.library without an autograd formula."""
    assert attention_dispatch._wrapped_flash_attn_3._backward_fn is None and "_flash_3".startswith(
        attention.FORWARD_ONLY
    )


@pytest.mark.parametrize(
    "wanted, device, dtype, sentence",
    [
        (
            "flush",
            "cuda",
            torch.bfloat16,
            "there is no attention backend 'flush' (did you mean flash?): use auto, or one of flash, ",
        ),
        ("", "cpu", torch.float32, "there is no attention backend '': use auto, or one of "),
        (
            "flash_hub",
            "cuda",
            torch.bfloat16,
            "attention backend flash_hub downloads its kernel, and this project downloads none: "
            "install a package, and use one of ",
        ),
        (
            "flash",
            "cuda",
            torch.bfloat16,
            "attention backend flash needs flash-attn, which is not installed or does not load: "
            "install it, or use _native_cudnn.",
        ),
        (
            "_flash_3",
            "cpu",
            torch.float32,
            "attention backend _flash_3 needs FlashAttention 3, which is not installed or does not load: "
            "install it, or use native.",
        ),
        ("_sage_qk_int8_pv_fp16_cuda", "cuda", torch.bfloat16, "needs sageattention, which is not installed"),
        ("xformers", "cuda", torch.bfloat16, "needs xformers, which is not installed"),
        (
            "_native_cudnn",
            "cpu",
            torch.bfloat16,
            "attention backend _native_cudnn needs 16-bit values on a CUDA card, "
            "but this is bfloat16 on cpu: use native.",
        ),
        ("_native_cudnn", "cuda", torch.float32, "but this is float32 on cuda: use native."),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_backend_that_cannot_be(machine, wanted, device, dtype, sentence, training):
    machine(9, set())
    with pytest.raises(AptError) as error:
        choose_backend(wanted, device, dtype, training=training)
    assert (
        sentence in str(error.value) and str(error.value).count(". ") == 0 and str(error.value).endswith(".")
    )


def test_attend_is_softmax_attention():
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (4, 5, 5))
    weights = (torch.einsum("bmhc,bnhc->bhmn", q, k) * 8**-0.5).softmax(dim=3)
    torch.testing.assert_close(
        attend(q, k, v), torch.einsum("bhmn,bnhc->bmhc", weights, v), rtol=0, atol=1e-12
    )


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
    mmdit = tiny_mmdit(2)
    for model, calls in ((wan(layers=2), 4), (mmdit, 2)):
        before = model(x, 1000 * t, text, return_dict=False)[0]
        assert called == ["native"] * calls
        called.clear()
        model.use_attention("_native_math")
        torch.testing.assert_close(model(x, 1000 * t, text, return_dict=False)[0], before, rtol=0, atol=1e-5)
        assert called == ["_native_math"] * calls
        called.clear()
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
