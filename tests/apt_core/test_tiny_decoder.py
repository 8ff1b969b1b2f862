"""The tiny decoders: files, and equality with the public architecture written out frame by frame."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.models.tiny_decoder import TinyDecoder, load_tiny_decoder


@pytest.fixture(scope="module", params=[16, 48])
def file(request, tmp_path_factory):
    torch.manual_seed(0)
    model = TinyDecoder(request.param).requires_grad_(False)
    for p in model.parameters():
        p.mul_(1.5)
    model.decoder[22].bias.fill_(0.5)  # most pixels inside of the range
    path = tmp_path_factory.mktemp("tiny") / "tae.safetensors"
    save_file(model.state_dict() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    return path


def reference(path, latents: torch.Tensor) -> torch.Tensor:
    """All frames of one clip at once, layer numbers as in the public files: 1 first convolution; 3-5, 9-11,
    15-17 blocks with the frame before; 7, 13, 19 growth in time; 8, 14, 20 and 22 convolutions.
    """
    w = {key: value.double() for key, value in load_file(path).items()}

    def conv(x, name):
        weight = w[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, w.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv(3 * torch.tanh(latents.double()[0].transpose(0, 1) / 3), 1).relu()
    for start in (3, 9, 15):
        for i in range(start, start + 3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = conv(torch.cat([x, before], 1), f"{i}.conv.0").relu()
            x = (conv(conv(y, f"{i}.conv.2").relu(), f"{i}.conv.4") + x).relu()
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        y = conv(x, f"{start + 4}.conv")
        x = conv(y.reshape(-1, x.shape[1], *x.shape[2:]), start + 5)
    x = conv(x.relu(), 22)
    if x.shape[1] == 12:
        x = F.pixel_shuffle(x, 2)
    return x[3:].clamp(0, 1).permute(0, 2, 3, 1) * 2 - 1


def test_equals_the_public_architecture(file, monkeypatch):
    model = load_tiny_decoder(file)
    latents = torch.randn(2, model.z_dim, 3, 3, 2, generator=torch.Generator().manual_seed(1)) * 4
    found = model.decode(latents)
    s = 16 if model.z_dim == 48 else 8
    assert found.shape == (2, 9, 3 * s, 2 * s, 3) and found.dtype == torch.float32 and found.std() > 0.05
    assert torch.equal(model.decode(latents, uint8=True), ((found + 1) * 127.5).round().to(torch.uint8))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    found = load_tiny_decoder(file, torch.float64).decode(latents)
    assert [part.shape[1] for part in model.stream(latents)] == [1, 4, 4]
    for clip in range(2):
        torch.testing.assert_close(found[clip], reference(file, latents[clip : clip + 1]), rtol=0, atol=1e-10)


def test_says_that_it_is_approximate(file):
    model = load_tiny_decoder(file, torch.bfloat16)
    assert (
        model.approximate
        and model.decoder[1].weight.dtype == torch.bfloat16
        and not model.decoder[1].weight.requires_grad
    )
    assert model.decode(torch.zeros(1, model.z_dim, 1, 1, 1)).dtype == torch.float32


def test_a_pipeline_with_it_says_that_it_is_approximate(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "tae.safetensors"
    save_file(TinyDecoder(16).state_dict(), path)
    pipe = OneStepPipeline.from_checkpoint("mini", tiny_decoder=path, cache=tmp_path)
    assert pipe.approximate and not OneStepPipeline.from_checkpoint("mini").approximate
    video = pipe("a red circle", seed=1)
    request = pipe.request("a red circle", seed=1)
    expected = load_tiny_decoder(path).decode(pipe.latents(request, 0, pipe.embed(request)), uint8=True)
    assert video.frames.shape == (9, 48, 48, 3) and (expected[0].numpy() == video.frames).all()
    with pytest.raises(
        AptError,
        match=(
            r"is a tiny decoder, whose pictures are only close to the VAE's: give the VAE, or give this file"
            r" as tiny_decoder\.$"
        ),
    ):
        OneStepPipeline.from_checkpoint("mini", vae=path)
    save_file(TinyDecoder(48).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(AptError, match="has 48 channels, but .* makes latents of 16"):
        OneStepPipeline.from_checkpoint("mini", tiny_decoder=tmp_path / "wide.safetensors")


def test_refuses_other_latents(file):
    model = load_tiny_decoder(file)
    with pytest.raises(AptError, match=rf"taew2_[12]'s: give \[batch, {model.z_dim}, frames"):
        model.decode(torch.zeros(1, 8, 1, 2, 2))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("decoder.7.conv.weight"), ["decoder.7.conv.weight", "missing"]),
        (lambda t: t.update({"decoder.23.weight": torch.ones(1)}), ["decoder.23.weight"]),
        (lambda t: t.update({"decoder.22.bias": torch.ones(4)}), ["decoder.22.bias", "(4,)"]),
        (lambda t: t["decoder.22.bias"].fill_(float("nan")), ["decoder.22.bias", "NaN"]),
        (
            lambda t: t.update({"decoder.1.weight": torch.ones(256, 32, 3, 3)}),
            ["not a tiny decoder for Wan", "taew2_1"],
        ),
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), ["not a tiny decoder for Wan"]),
    ],
)
def test_files_that_cannot_be_used(file, tmp_path, change, words):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AptError) as caught:
        load_tiny_decoder(tmp_path / "x.safetensors")
    assert all(word in str(caught.value) for word in (*words, "x.safetensors")), caught.value


def test_refuses_a_pickle(tmp_path):
    torch.save({}, tmp_path / "taew2_1.pth")
    with pytest.raises(AptError, match="pickle"):
        load_tiny_decoder(tmp_path / "taew2_1.pth")
