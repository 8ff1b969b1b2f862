"""The attention backend of a training reaches every network, and nothing beside it is called."""

import os
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from layouts import Layout, assert_close, in_double, mmdit, run_workers, train_adversarial, train_distill
from torch.autograd.function import once_differentiable

from apt_core.loading.backbones import load_backbone
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Lora, adversarial_networks, distillation_networks, matching_networks

WANTED = "_native_math"


def backends(network) -> set[str | None]:
    """Of all attention in a network, whole or a role."""
    backbone = getattr(network, "backbone", network)
    found = set()
    for block in getattr(backbone, "base", backbone).blocks:
        if hasattr(block, "attention_backend"):
            found.add(block.attention_backend)
        else:
            found |= {block.attn1.processor._attention_backend, block.attn2.processor._attention_backend}
    return found


@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["wan", "mmdit"])
def test_every_network_has_it(kind, lora, files):
    start, base = (mmdit(path) if kind == "mmdit" else path for path in (files.start, files.base))
    for attention in (None, WANTED):
        parallel = Parallel(attention=attention, checkpointing="blocks")
        stage2 = adversarial_networks(base if lora else start, base, load_backbone, World(), parallel, lora)
        stage1 = distillation_networks(base, load_backbone, World(), parallel, lora, target=True)
        matching = matching_networks(base, load_backbone, World(), parallel, lora, Lora(4))
        networks = [stage2.generator, stage2.discriminator, stage1.generator, stage1.teacher, stage1.target]
        networks += [matching.generator, matching.teacher, matching.fake]
        assert [backends(network) for network in networks] == [{attention}] * 8


@contextmanager
def counted():
    """How often each of diffusers' backends is called."""
    calls: dict[str, int] = {}

    def call(name, kernel, *args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        return kernel(*args, **kwargs)

    counters = {
        name: partial(call, name.value, kernel)
        for name, kernel in _AttentionBackendRegistry._backends.items()
    }
    with patch.dict(_AttentionBackendRegistry._backends, counters):
        yield calls


def train_counted(train, files, layout, out, options) -> None:
    with counted() as calls:
        train(files, layout, out, options)
    torch.save(calls, out / f"calls-{os.environ.get('RANK', 0)}.pt")


@pytest.mark.parametrize("train", [train_adversarial, train_distill])
@pytest.mark.parametrize("kind", ["wan", "mmdit"])
@pytest.mark.parametrize("checkpointing, cp", [("blocks", 1), ("offload", 2)])
def test_nothing_else_is_called(train, kind, checkpointing, cp, files, tmp_path):
    """Also in the recomputation and with tokens shared by processes; the numbers are those of another
    backend.
    """
    options = (
        {"start": mmdit(files.start), "base": mmdit(files.base), "load": load_backbone}
        if kind == "mmdit"
        else {}
    )
    if train is train_distill:
        options.pop("start", None)
    for attention, wanted in ((None, "native"), (WANTED, WANTED)):
        out = tmp_path / wanted
        out.mkdir()
        layout = Layout(
            cp,
            Parallel(context_parallel=cp, checkpointing=checkpointing, attention=attention),
            {"updates": 2},
        )
        run_workers(cp, in_double, train_counted, train, files, layout, out, options)
        for path in out.glob("calls-*.pt"):
            assert torch.load(path).keys() == {wanted}
    assert_close(tmp_path / WANTED, tmp_path / "native", 2, 1e-5)


class FirstDerivative(torch.autograd.Function):
    """Attention with a backward pass, but no second derivative and no forward mode, like fused kernels."""

    calls = {True: 0, False: 0}  # by whether gradients are on

    @staticmethod
    def attend(q, k, v):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return FirstDerivative.attend(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(FirstDerivative.attend(*inputs), inputs, gradient)


def first_derivative(query, key, value, *nothing, **other):
    assert not nothing and not any(other.values())  # no mask, no dropout, no scale of its own
    FirstDerivative.calls[torch.is_grad_enabled()] += 1
    return FirstDerivative.apply(query, key, value)


@pytest.mark.parametrize(
    "train, settings",
    [
        (train_adversarial, {"r2_weight": 10.0}),
        (train_distill, {}),
        (train_distill, {"method": "dmd", "regression": 1.0, "regression_steps": 2, "fake_updates": 1}),
    ],
    ids=["adversarial", "consistency", "dmd"],
)
def test_no_pass_needs_more_than_a_first_derivative(train, settings, files, tmp_path, monkeypatch):
    """In the transformers and in the discriminator's heads."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", first_derivative)
    x = torch.randn(1, 1, 2, 4, requires_grad=True)
    (once,) = torch.autograd.grad(first_derivative(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
    before = dict(FirstDerivative.calls)
    train(files, Layout(1, Parallel(checkpointing="blocks"), {"updates": 1, **settings}), tmp_path, {})
    assert all(count > before[grad] for grad, count in FirstDerivative.calls.items())


def flash_2(q, k, v, dropout_p, softmax_scale, causal, return_attn_probs, window_size=(-1, -1)):
    """What FlashAttention 2 takes and gives, and what it refuses."""
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and all(x.stride(-1) == 1 for x in (q, k, v))
    assert (dropout_p, causal, window_size, return_attn_probs) == (0.0, False, (-1, -1), False)
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale
    ).transpose(1, 2)


@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["wan", "mmdit"])
def test_flash_attention_sees_16_bits_in_a_training_in_bf16(kind, lora, files, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_2)
    start, base = (
        mmdit(path) if kind == "mmdit" else path for path in (files.base if lora else files.start, files.base)
    )
    options = {"start": start, "base": base, "load": load_backbone, "lora": lora}
    rows = []
    for attention in (None, "flash"):
        out = tmp_path / str(attention)
        out.mkdir()
        layout = Layout(
            1, Parallel(compute="bf16", checkpointing="blocks", attention=attention), {"updates": 2}
        )
        train_counted(train_adversarial, files, layout, out, options)
        assert torch.load(out / "calls-0.pt").keys() == {attention or "native"}
        rows.append(torch.load(out / "rows.pt"))
    for one, other in zip(*rows, strict=True):
        assert one["d_loss"] == pytest.approx(other["d_loss"], rel=1e-3) and one["g_loss"] == pytest.approx(
            other["g_loss"], rel=1e-3
        )
