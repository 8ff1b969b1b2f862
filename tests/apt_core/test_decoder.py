"""The streaming decoder against diffusers' decode: whole, in slices, in bands of rows, after running out of
memory, compiled.
"""

import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from failing import Failing
from live_bytes import LiveBytes
from moved_bytes import MovedBytes
from vae_configs import RELEASED_22, SMALL_22

import apt_core
from apt_core.engine.decoder import Decoder, psnr
from apt_core.engine.decoder_layers import CausalConv, Stream, Whole, decoder_layers
from apt_core.engine.decoder_memory import Plan, account, choose, largest
from apt_core.errors import AptError, OutOfMemory
from apt_core.models import vae as wan_vae

MINI = Path(apt_core.__file__).parent / "assets/mini/vae/apt_mini_vae.safetensors"
VERSIONS = {
    "2.1": {"base_dim": 4},
    # The last level but one halves its channels, as the released one's does, so that the shortcut picks among
    # them.
    "2.2": SMALL_22,
}
FULL = {
    "2.1": {},
    "2.2": RELEASED_22,
}


@pytest.fixture(scope="module", params=VERSIONS)
def vae(request):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VERSIONS[request.param]).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if name.endswith(("bias", "gamma")):
            p.add_(torch.randn_like(p) * 0.1)  # an unlike border, and attention that matters
    return vae.double()


def latents(vae, frames: int, height: int, width: int, clips: int = 1) -> torch.Tensor:
    shape = clips, vae.config.z_dim, frames, height, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)


def stock(vae, z: torch.Tensor) -> torch.Tensor:
    return wan_vae.decode(vae, z).movedim(1, -1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def by_conv3d(decoder: Decoder) -> None:
    """As on a GPU: one 3-D convolution each."""
    for layer in sum(decoder.layers, []):
        for conv in (layer, *vars(layer).values()):
            if isinstance(conv, CausalConv):
                conv.by_taps = False


@pytest.mark.parametrize("size", [(1, 3, 5), (2, 5, 2), (6, 2, 3)])
def test_equals_stock_for_any_frames_per_call(double, vae, size):
    z = latents(vae, *size, clips=2)
    expected = stock(vae, z)
    assert 0.05 < expected.std() and (expected.abs() == 1).double().mean() < 0.3
    for k in (1, 2, 4, None):
        decoder = Decoder(vae, frames_per_call=k)
        close(decoder.decode(z), expected)
        by_conv3d(decoder)
        close(decoder.decode(z), expected)


def test_slices_come_in_time_order(double, vae):
    z = latents(vae, 6, 2, 2)
    slices = list(Decoder(vae, frames_per_call=4).stream(z))
    assert [s.shape[1] for s in slices] == [13, 8] and slices[0].shape[2:] == (
        2 * wan_vae.stride(vae)[1],
        2 * wan_vae.stride(vae)[2],
        3,
    )
    close(torch.cat(slices, dim=1), stock(vae, z))


def test_bytes(vae):
    z = latents(vae, 2, 3, 2)
    decoder = Decoder(vae)
    pixels, found = decoder.decode(z), decoder.decode(z, uint8=True)
    assert (
        found.dtype == torch.uint8
        and torch.equal(found, ((pixels + 1) * 127.5).round().to(torch.uint8))
        and len(found.unique()) > 50
    )


@pytest.mark.parametrize("bands", [2, 3])
def test_bands_and_memory_on_the_cpu_are_exact(double, vae, bands):
    z = latents(vae, 3, 9, 3, clips=2)
    decoder = Decoder(vae)
    decoder.plans[z.movedim(1, -1).shape] = Plan(2, bands, offload=True)
    close(decoder.decode(z), stock(vae, z))


def test_out_of_memory_in_the_middle_loses_and_doubles_no_frame(double, vae):
    z = latents(vae, 7, 6, 2)
    decoder = Decoder(vae, frames_per_call=3)
    # the second slice at 3 frames, then the third at 1
    decoder.layers[1][2] = Failing(decoder.layers[1][2], calls=(2, 5))
    told = []
    slices = list(decoder.stream(z, report=told.append))
    close(torch.cat(slices, dim=1), stock(vae, z))
    assert (
        told
        == decoder.steps_taken
        == [
            "The VAE decode was out of memory with 3 latent frames per call: "
            "it goes on with 1 latent frame per call.",
            "The VAE decode was out of memory with 1 latent frame per call: "
            "it goes on with 1 latent frame per call in 2 bands of rows.",
        ]
    )
    assert [s.shape[1] for s in slices] == [9, 4, 4, 4, 4]
    # It remembers what fits.
    close(decoder.decode(z), stock(vae, z))
    assert len(decoder.steps_taken) == 2


def test_out_of_memory_in_cudnns_words(vae):
    z, decoder = latents(vae, 2, 6, 2), Decoder(vae, frames_per_call=2)
    decoder.layers[0][1] = Failing(
        decoder.layers[0][1],
        calls=(1,),
        error=RuntimeError("GET was unable to find an engine to execute this computation"),
    )
    assert decoder.decode(z).shape[1] == 5 and len(decoder.steps_taken) == 1
    decoder.layers[0][1] = Failing(decoder.layers[0][1], calls=(1,), error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        decoder.decode(z)


def test_out_of_memory_to_the_end_is_a_sentence(vae):
    decoder = Decoder(vae, frames_per_call=2)
    decoder.layers[0][0] = Failing(decoder.layers[0][0], calls=range(100))
    with pytest.raises(
        OutOfMemory,
        match=r"with 1 latent frame per call in 2 bands of rows, what it remembers on the CPU: free memory",
    ):
        decoder.decode(latents(vae, 3, 6, 2))
    assert len(decoder.steps_taken) == 3


@pytest.mark.parametrize("plan", [Plan(2), Plan(1), Plan(1, 2), Plan(1, 4)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_account(version, plan):
    vae = AutoencoderKLWan(**VERSIONS[version] | {"base_dim": 12, "decoder_base_dim": 12}).eval()
    decoder = Decoder(vae)
    z = torch.zeros(2, 4, 12, 8, vae.config.z_dim)
    with torch.inference_mode(), LiveBytes() as live:
        for pixels in decoder._slices(z, plan, Whole()):
            pixels.float()
    told = account(decoder.layers, z.shape[:4], plan, torch.float32)
    assert live.peak <= told <= 1.3 * live.peak


def test_remembering_on_the_cpu_saves_what_is_remembered():
    layers = decoder_layers(AutoencoderKLWan(**VERSIONS["2.1"]).requires_grad_(False))
    here, away = (
        account(layers, (1, 3, 4, 5), Plan(1, 1, offload), torch.float32) for offload in (False, True)
    )
    stream = Stream(Whole())
    stream.last = False
    x = torch.zeros(2, 4, 5, 16)
    for layer in layers[0] + layers[1]:
        x = layer(x, stream)
    remembered = sum(frames.nbytes for frames in stream.memory.values())
    assert here - away == remembered > 0


@pytest.mark.parametrize("version, size, frames", [("2.2", (44, 80), 4), ("2.1", (90, 160), 5)])
def test_the_largest_tensor(version, size, frames):
    with torch.device("meta"):
        layers = decoder_layers(AutoencoderKLWan(**FULL[version]))
    sizes = [largest(layers, (1, 13, *size), Plan(k)) for k in (frames, frames + 1)]
    assert sizes[0] < 2**31 <= sizes[1]


@pytest.mark.parametrize(
    "version, size, gib, plan",
    [
        ("2.2", (13, 44, 80), 7 - 1.03, Plan(1, 4)),  # what an 8 GB card has beside the decoder's weights
        ("2.2", (13, 44, 80), 11, Plan(2)),
        ("2.2", (13, 44, 80), 9, Plan(1)),
        ("2.2", (13, 44, 80), 79, Plan(4)),  # more would make tensors of 2^31 numbers
        ("2.2", (13, 44, 80), 2, Plan(1, 14, True)),
        ("2.1", (13, 90, 160), 7, Plan(1, 4)),
        ("2.1", (13, 90, 160), 79, Plan(5)),
    ],
)
def test_plans_for_49_frames_of_720p(version, size, gib, plan):
    with torch.device("meta"):
        vae = AutoencoderKLWan(**FULL[version])
    assert (
        choose(decoder_layers(vae), (1, *size), torch.bfloat16, None, int(gib * 2**30), torch.device("cuda"))
        == plan
    )


class Kernels:
    """In the place of the Triton kernels: reads and writes as much as they do."""

    moved = 0

    @classmethod
    def extend(cls, x, gamma, before, *, memory, keep, out=None):
        out = x.new_empty(memory + len(x), *x.shape[1:]) if out is None else out
        cls.moved += x.nbytes + out.nbytes + (0 if before is None else (1 + keep) * before.nbytes)
        return out


@pytest.mark.parametrize("version, stock_gb, our_gb", [("2.1", 3382, 669), ("2.2", 2705, 597)])
def test_memory_traffic_of_49_frames_of_720p(version, stock_gb, our_gb, monkeypatch):
    """What a GPU reads and writes in a decode in bf16, by count. At this size the time beside the
    convolutions goes there.
    """
    with torch.device("meta"):
        vae = AutoencoderKLWan(**FULL[version]).requires_grad_(False).bfloat16()
        z = torch.empty(
            1, vae.config.z_dim, 13, *((90, 160) if version == "2.1" else (44, 80)), dtype=torch.bfloat16
        )
    with torch.inference_mode(), MovedBytes() as theirs:
        vae.decode(z)
    monkeypatch.setattr(Kernels, "moved", 0)
    decoder = Decoder(vae, budget=2**50)
    real = Stream.__init__
    monkeypatch.setattr(
        Stream, "__init__", lambda self, rows, device=None, kernels=None: real(self, rows, device, Kernels)
    )
    with torch.inference_mode(), MovedBytes() as ours:
        for _ in decoder.stream(z, uint8=True):
            pass
    assert (ours.total + Kernels.moved) / 1e9 == pytest.approx(our_gb, rel=0.01)
    assert theirs.total > 3 * (ours.total + Kernels.moved)
    if diffusers.__version__.startswith("0.42."):  # whose figure it is; 0.36 moves a quarter less
        assert theirs.total / 1e9 == pytest.approx(stock_gb, rel=0.01)


def test_compiled(double):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VERSIONS["2.2"] | {"num_res_blocks": 0}).eval().requires_grad_(False).double()
    z = latents(vae, 2, 2, 2)
    decoder = Decoder(vae, frames_per_call=1)
    expected = decoder.decode(z)
    decoder._run = torch.compile(decoder._run, backend="aot_eager", fullgraph=True, dynamic=False)
    close(decoder.decode(z), expected)
    close(expected, stock(vae, z))


def test_compiled_for_many_sizes(double, monkeypatch):
    """Each size of a stream is three graphs; torch gives up after eight unless it is told otherwise."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: real(function, backend="eager", **options)
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VERSIONS["2.1"] | {"num_res_blocks": 0}).eval().requires_grad_(False).double()
    with torch._dynamo.config.patch(recompile_limit=8):
        decoder = Decoder(vae, frames_per_call=1, compile=True)
        for rows in (1, 2, 3, 4):
            z = latents(vae, 3, rows, 2)
            close(decoder.decode(z), stock(vae, z))


def test_bf16_is_as_near_as_stock_bf16():
    vae = wan_vae.load_vae(MINI)
    z = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    exact = stock(vae, z)
    vae.bfloat16()
    ours, theirs = psnr(Decoder(vae).decode(z), exact), psnr(stock(vae, z), exact)
    assert ours > 35 and ours > theirs - 1


def test_psnr():
    x = torch.zeros(1, 2, 4, 4, 3)
    assert psnr(x + 0.02, x) == pytest.approx(40, abs=1e-3) and psnr(x, x) == math.inf


def test_mini_with_less_memory_than_stock(double):
    vae = wan_vae.load_vae(MINI).double()
    z = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad(), LiveBytes() as theirs:
        expected = stock(vae, z)
    decoder = Decoder(vae)
    with LiveBytes() as ours:
        found = torch.cat(list(decoder.stream(z)), dim=1)
    close(found, expected)
    assert ours.peak < theirs.peak


def test_the_vae_keeps_its_weights_without_a_copy():
    vae = wan_vae.load_vae(MINI)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    decoder = Decoder(vae)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert decoder.layers[0][1].weight is vae.decoder.conv_in.weight


def test_refuses(vae):
    z = vae.config.z_dim
    for shape in ((1, z + 1, 1, 2, 2), (z, 1, 2, 2), (1, z, 0, 2, 2)):
        with pytest.raises(AptError, match=rf"\[batch, {z}, frames, height, width\]"):
            Decoder(vae).decode(torch.zeros(shape))
    with pytest.raises(AptError, match="frames_per_call is 0"):
        Decoder(vae, frames_per_call=0)
