"""What makes a transformer fast must leave its result: fused projections, compiled blocks; and fp8 as far as
8 bits reach.
"""

import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from tiny_models import tiny_mmdit, tiny_wan
from torch import nn

from apt_core.engine import fast
from apt_core.engine.fast import Speed, check_compile, make_fast
from apt_core.engine.fp8 import FP8, Fp8Linear, check_fp8, quantise, to_fp8
from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.models.wan import predict_velocity

CPU = torch.device("cpu")


def wan() -> nn.Module:
    return tiny_wan(num_attention_heads=4, attention_head_dim=16, ffn_dim=96).eval()


def mmdit() -> nn.Module:
    return tiny_mmdit(3, num_attention_heads=4, attention_head_dim=16, axes_dims_rope=(4, 6, 6)).eval()


def velocity(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 5, 10, generator=g)
    with torch.no_grad():
        return predict_velocity(model, x.to(dtype), torch.ones(2, dtype=dtype), text.to(dtype))


@pytest.mark.parametrize("make", [wan, mmdit])
def test_fused_projections_give_the_same_numbers_with_as_many_weights(double, make):
    model, expected = make().double(), velocity(make().double(), torch.float64)
    count = sum(p.numel() for p in model.parameters())
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    model.fuse_projections()
    assert sum(p.numel() for p in model.parameters()) == count
    # Wan: 3 -> 1 and 2 -> 1 in each of 3 blocks; MMDiT: 3 -> 1 in each stream but the last text, of which
    # only keys are left.
    assert linears - sum(isinstance(module, nn.Linear) for module in model.modules()) == (
        9 if make is wan else 10
    )
    torch.testing.assert_close(velocity(model, torch.float64), expected, rtol=0, atol=1e-12)


def test_make_fast_compiled(double, monkeypatch):
    """Each block is one graph; what a compiler makes of it is torch's own business."""
    real, runs = torch.compile, []

    def count(graph, inputs):
        return lambda *values: runs.append(graph) or graph(*values)

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: real(function, backend=count, fullgraph=True, **options)
    )
    model, expected = (
        make_fast(wan().double(), CPU, Speed(compile=True)),
        velocity(wan().double(), torch.float64),
    )
    torch.testing.assert_close(velocity(model, torch.float64), expected, rtol=0, atol=1e-12)
    assert len(runs) == len(model.blocks) and not any(p.requires_grad for p in model.parameters())


START = """
import sys, torch
from torch._dynamo.utils import counters
from apt_core.engine.pipeline import OneStepPipeline

pipe = OneStepPipeline.from_checkpoint("mini", compile=True, cache=sys.argv[1])
request = pipe.request("a red circle", height=32, width=32, frames=1)
latents = pipe.latents(request, 0, torch.ones(1, 32, 96))
graphs, hits = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_hit"]
torch.save((latents, graphs, hits), sys.argv[2])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_second_start_finds_what_was_compiled(tmp_path, monkeypatch):
    """One graph serves all blocks and changes no number, and the next process compiles nothing."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found, compiled = [], []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", START, tmp_path / "cache", tmp_path / "out.pt"], check=True)
        found.append(torch.load(tmp_path / "out.pt"))
        libraries = (tmp_path / "cache/compiled").rglob("*.so")
        compiled.append({path: path.stat().st_mtime_ns for path in libraries})
    assert compiled[0] and compiled[1] == compiled[0]
    assert [(graphs, hits) for _, graphs, hits in found] == [(1, 0), (1, 1)]
    pipe = OneStepPipeline.from_checkpoint("mini", cache=tmp_path)
    expected = pipe.latents(
        pipe.request("a red circle", height=32, width=32, frames=1), 0, torch.ones(1, 32, 96)
    )
    for latents, *_ in found:
        torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5)


def test_nothing_to_compile_with_is_a_sentence(monkeypatch):
    none = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with (
        none,
        pytest.raises(
            AptError,
            match=(
                r"^compiling for a CPU needs a C\+\+ compiler, and there is none: install g\+\+, or leave"
                r" compile out\.$"
            ),
        ),
    ):
        check_compile(CPU)
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    with pytest.raises(
        AptError,
        match=(
            r"^compiling for cuda needs Triton, which is not installed: install it, or leave compile out\.$"
        ),
    ):
        check_compile(torch.device("cuda"))


@pytest.mark.parametrize("rowwise", [True, False])
def test_quantise(rowwise):
    x = (
        torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1, 100, 0, 1e4])[:, None]
    )
    q, scale = quantise(x, rowwise)
    assert q.dtype == FP8 and scale.shape == ((5, 1) if rowwise else ())
    back = q.float() * scale
    rows = slice(None) if rowwise else slice(4, 5)  # one scale for all crushes the small rows
    error, bound = (
        (back - x)[rows].abs(),
        x[rows].abs() / 16 + scale[rows] * 2**-10 if rowwise else x[rows].abs() / 16 + scale * 2**-10,
    )
    assert (error <= bound).all() and (back[3] == 0).all()
    assert torch.equal(back.abs().amax(1)[4], x.abs().amax(1)[4])  # the largest value is exact
    assert rowwise or not back[0].any()


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_fp8_linear(rowwise, dtype, bias):
    if rowwise and not check_fp8(CPU):
        pytest.skip("this torch has no scales for rows on a CPU")
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    layer = Fp8Linear(linear, rowwise)
    x = torch.randn(2, 7, 64, dtype=dtype)
    with torch.no_grad():
        y, expected = layer(x), linear(x)
    assert y.shape == expected.shape and y.dtype == dtype
    assert 0.01 < (y.float() - expected.float()).norm() / expected.float().norm() < 0.05
    # the arithmetic itself, on the rounded numbers
    q, scale = quantise(x.reshape(-1, 64), rowwise)
    exact = (q.float() * scale) @ (layer.weight.float() * (layer.scale.t() if rowwise else layer.scale)).t()
    exact = exact + linear.bias.float() if bias else exact
    torch.testing.assert_close(
        y.reshape(-1, 48).float(),
        exact,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


@pytest.mark.parametrize("make", [wan, mmdit])
def test_a_transformer_in_fp8(make):
    expected = velocity(make())
    model = make_fast(make(), CPU, Speed(fp8=True))
    eight = [name for name, module in model.blocks.named_modules() if isinstance(module, Fp8Linear)]
    assert len(eight) == (21 if make is wan else 22) and not any("modulation" in name for name in eight)
    assert 1e-3 < (velocity(model) - expected).norm() / expected.norm() < 0.06
    assert isinstance(to_fp8(make(), check_fp8(CPU)).proj_out, nn.Linear)


def test_wide_weights_go_one_by_one():
    """A model in 8 bits fits where it does not in 16: no more than one layer is there in both."""
    model, alive, most = mmdit(), [], 0
    real = Fp8Linear.__init__

    def watch(self, linear, rowwise):
        nonlocal most
        alive.append(weakref.ref(linear))
        most = max(most, sum(layer() is not None for layer in alive))
        real(self, linear, rowwise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fp8Linear, "__init__", watch)
        to_fp8(model)
    assert len(alive) > 20 and most <= 2


def test_a_card_without_fp8_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        AptError,
        match=r"^NVIDIA A100 has no fp8 matrix units \(Ada, Hopper and Blackwell have\): leave fp8 out\.$",
    ):
        check_fp8(torch.device("cuda"))
    for capability, rowwise in (((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert check_fp8(torch.device("cuda")) is rowwise


def test_the_best_attention_is_set_for_this_model_alone(monkeypatch):
    monkeypatch.setattr(fast, "best_backend", lambda device, dtype, head_dim: f"best for {head_dim}")
    model, other = make_fast(wan(), CPU), wan()
    assert {block.attn1.processor._attention_backend for block in model.blocks} == {"best for 16"}
    assert {block.attn1.processor._attention_backend for block in other.blocks} == {None}
    assert {block.attention_backend for block in make_fast(mmdit(), CPU, Speed("native")).blocks} == {
        "native"
    }


def test_time_is_one_number_a_sample(monkeypatch):
    """Wan 2.2 5B also takes a time for each token; for text to video that costs 400 MB of modulation and
    changes nothing.
    """
    model, seen = wan(), []
    model.condition_embedder.register_forward_hook(
        lambda module, inputs, outputs: seen.append((inputs[0].shape, outputs[1].shape))
    )
    velocity(model)
    assert seen == [((2,), (2, 6 * 64))]
