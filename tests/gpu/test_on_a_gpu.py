"""What only a card can show: `pytest tests/gpu` on a machine with one. APT_GPU=cpu rehearses all that a CPU
can do.
"""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from apt_core.engine.decoder import Decoder, psnr
from apt_core.engine.decoder_memory import Plan, account
from apt_core.engine.fp8 import Fp8Linear, check_fp8
from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.residence import ALL, BLOCKS, PARTS
from apt_core.models.attention import attend, best_backend
from apt_core.models.vae import decode
from trainer.bench.shapes import find_shapes

DEVICE = torch.device(os.environ.get("APT_GPU", "cuda"))
CARD = DEVICE.type == "cuda"
PROMPT = "a red circle moving left on a green background"
pytestmark = pytest.mark.skipif(
    CARD and not torch.cuda.is_available(), reason="no GPU here; APT_GPU=cpu rehearses what a CPU can do"
)
card_only = pytest.mark.skipif(not CARD, reason="only a card has memory of its own")
FULL = {"2.1": "wan2.1-1.3b", "2.2": "wan2.2-5b"}


@pytest.fixture(scope="module", params=FULL)
def vae(request):
    """Of the released shapes, with random weights, in bf16."""
    return find_shapes(FULL[request.param]).vae(DEVICE, torch.bfloat16).eval().requires_grad_(False)


def draw(vae, *size: int) -> torch.Tensor:
    return torch.randn(1, vae.config.z_dim, *size, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture(scope="module")
def exact(vae):
    """(latents, diffusers' decode of them in fp32, PSNR of diffusers' own in bf16)."""
    z = draw(vae, 4, 6, 8)
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False),
    ):
        wide = decode(copy.deepcopy(vae).float(), z).movedim(1, -1).clamp(-1, 1)
        own = decode(vae, z).movedim(1, -1).clamp(-1, 1)
    assert 0.05 < wide.std() and (wide.abs() == 1).float().mean() < 0.5
    return z, wide, psnr(own, wide)


@pytest.mark.parametrize("frames", [1, 2, None])
@pytest.mark.parametrize("kernels", [True, False])
def test_decode_is_as_near_to_fp32_as_stock(frames, kernels, vae, exact):
    z, wide, stock = exact
    decoder = Decoder(vae, frames_per_call=frames)
    decoder._kernels = decoder._kernels if kernels else None
    assert psnr(decoder.decode(z), wide) > stock - 1 and stock > 30


@card_only
def test_compiled_decode_of_many_sizes(vae, exact):
    z, wide, stock = exact
    decoder = Decoder(vae, compile=True, frames_per_call=1)
    assert psnr(decoder.decode(z), wide) > stock - 1
    for rows in (3, 4, 5):  # three graphs each: beyond what torch allows by default
        assert decoder.decode(z[..., :rows, :]).isfinite().all()


@card_only
def test_kernel_beyond_32_bits():
    """The frames of a Wan 2.1 decode at 720p in one call have more numbers than 2^31."""
    kernels = pytest.importorskip("apt_core.engine.kernels")
    x = torch.randn(26, 720, 1280, 96, device=DEVICE, dtype=torch.bfloat16)
    before, gamma = torch.zeros(2, *x.shape[1:], device=DEVICE, dtype=x.dtype), torch.ones(96, device=DEVICE)
    out = kernels.extend(x, gamma, before, memory=2, keep=True)
    for frame in (0, 12, 25):
        wide = x[frame].float()
        expected = torch.nn.functional.silu(wide / wide.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(out[frame + 2].float(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(before, out[-2:]) and not out[:2].any()


@pytest.mark.parametrize("plan", [Plan(1, 2), Plan(2, 2, offload=True)], ids=str)
def test_bands_give_the_same_picture(plan, vae, exact):
    z, wide, stock = exact
    decoder = Decoder(vae)
    decoder.plans[z.movedim(1, -1).shape] = plan
    assert psnr(decoder.decode(z), wide) > stock - 1


@card_only
@pytest.mark.parametrize("frames", [1, 2])
def test_account_of_memory(frames, vae):
    decoder, z = Decoder(vae, frames_per_call=frames), draw(vae, 4, 44, 80)
    for _ in decoder.stream(z, uint8=True):
        pass  # cuDNN chooses its workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in decoder.stream(z, uint8=True):
        pass
    took = torch.cuda.max_memory_allocated() - before
    told = account(decoder.layers, (1, 4, 44, 80), Plan(frames), torch.bfloat16)
    assert 0.6 * told < took < 1.1 * told


@card_only
def test_real_out_of_memory(vae):
    z = draw(vae, 6, 44, 80)
    expected = Decoder(vae).decode(z, uint8=True)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    decoder = Decoder(vae, budget=2**50)  # so that nothing is foreseen
    one = account(decoder.layers, (1, 6, 44, 80), Plan(1), torch.bfloat16)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.3 * one) / total)
    try:
        found = decoder.decode(z, uint8=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert decoder.steps_taken and (found.int() - expected.int()).abs().max() <= 8


def make(tmp_path, dtype=torch.bfloat16, **options) -> tuple[torch.Tensor, np.ndarray, OneStepPipeline]:
    pipe = OneStepPipeline.from_checkpoint(
        "mini", device=DEVICE, dtype=dtype, cache=tmp_path, report=lambda _: None, **options
    )
    request = pipe.request(PROMPT, seed=3)
    latents = pipe.latents(request, 0, pipe.embed(request))
    return latents.cpu(), np.concatenate(list(pipe.frames(latents))), pipe


def test_pipeline_where_memory_is_short(tmp_path):
    latents, frames, pipe = make(tmp_path)
    assert pipe.residence.level == ALL and frames.shape == (9, 48, 48, 3)
    for memory, level in ((0.006, PARTS), (1e-4, BLOCKS)):
        found, shown, pipe = make(tmp_path, memory=memory)
        assert pipe.residence.level == level
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-6)
        assert np.abs(shown.astype(int) - frames).max() <= 4
        again = pipe(PROMPT, seed=3)
        assert np.array_equal(again.frames, shown)
        # a text that the cache has not: the encoder comes back, too
        many = pipe([PROMPT, "a blue square"], seed=3, count=2)
        assert np.array_equal(many[0].frames, shown) and len(many) == 4


def test_pipeline_compiled_and_in_fp8(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    wide, frames, _ = make(tmp_path, dtype=torch.float32)

    def error(**options) -> float:
        found, shown, _ = make(tmp_path, **options)
        assert np.abs(shown.astype(int) - frames).mean() < 20
        return ((found - wide).norm() / wide.norm()).item()

    plain, compiled, eight = error(), error(compile=True), error(fp8=True)
    assert compiled < 1.2 * plain < 0.1 and plain < eight < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_linear(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 192).to(DEVICE, dtype)
    x = torch.randn(2, 100, 256, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        found, expected = Fp8Linear(linear, check_fp8(DEVICE))(x), linear(x)
    assert found.dtype == dtype and 0.01 < (found - expected).float().norm() / expected.float().norm() < 0.05


def test_attention_backends():
    q, k, v = (
        torch.randn(1, n, 3, 128, generator=torch.Generator().manual_seed(n)).to(DEVICE)
        for n in (300, 200, 200)
    )
    scores = torch.einsum("bmhc,bnhc->bhmn", q, k) * 128**-0.5
    expected = torch.einsum("bhmn,bnhc->bmhc", scores.softmax(-1), v)
    for backend in {"native", best_backend(DEVICE, torch.bfloat16)}:
        found = attend(*(x.bfloat16() for x in (q, k, v)), backend=backend)
        assert (found.float() - expected).norm() / expected.norm() < 0.02, backend


def test_gradients_of_attention_backends():
    """What trainings on this card use, beside PyTorch's own choice."""
    inputs = [
        torch.randn(1, n, 3, 128, generator=torch.Generator().manual_seed(n)).to(DEVICE)
        for n in (300, 200, 200, 300)
    ]
    *qkv, grad = inputs
    wide = [x.clone().requires_grad_() for x in qkv]
    attend(*wide, backend="_native_math").backward(grad)
    for backend in {"native", best_backend(DEVICE, torch.bfloat16, training=True)}:
        narrow = [x.bfloat16().requires_grad_() for x in qkv]
        attend(*narrow, backend=backend).backward(grad.bfloat16())
        for one, other in zip(narrow, wide):
            assert (one.grad.float() - other.grad).norm() / other.grad.norm() < 0.02, backend


def command(*arguments) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    command(
        "trainer", "precompute", "mini", "images=64", "--kinds", "image", f"device={DEVICE}", "--out", folder
    )
    return folder / "latents"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_training_of_one_process_and_torchrun(mode, shards, tmp_path):
    """FSDP2, NCCL and states on one card; the same start gives nearly the same first losses as one process
    without them.
    """
    settings = (
        "adversarial",
        "mini",
        "--phase",
        "image",
        "updates=3",
        "batch=8",
        f"mode={mode}",
        f"device={DEVICE}",
        "--shards",
        shards,
    )
    command("trainer", *settings, "--out", tmp_path / "one")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    command(*torchrun, "-m", "trainer", *settings, "compute=bf16", "--out", tmp_path / "many")
    losses = []
    for run in ("one", "many"):
        table = next((tmp_path / run / "log").rglob("history.csv")).read_text(encoding="utf-8").splitlines()
        losses.append([float(row.split(",")[table[0].split(",").index("d_loss")]) for row in table[1:]])
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "what", [("inference", "--model", "mini", "--repeats", 2), ("train", "mini", "device=" + DEVICE.type)]
)
def test_bench(what, tmp_path):
    place = ("--device", DEVICE) if what[0] == "inference" else ()
    command("trainer", "bench", *what, *place, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found.get("velocity_error", 0) < 0.05
