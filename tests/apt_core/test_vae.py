"""The VAE: official keys, sizes, normalisation, and folding of one's own statistics into Wan's."""

import json

import pytest
import torch
import vae_configs
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from apt_core.errors import AptError
from apt_core.files.tensorfile import read_header
from apt_core.models.latents import (
    LATENTS_MEAN,
    LATENTS_STD,
    check_size,
    denormalize,
    fold_statistics,
    normalize,
    stride,
)
from apt_core.models.vae import decode, encode, load_vae, save_vae

SMALL_22 = vae_configs.SMALL_22 | {
    "latents_mean": list(LATENTS_MEAN["2.2"]),
    "latents_std": list(LATENTS_STD["2.2"]),
}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip():
    return torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def file(vae, tmp_path):
    save_vae(tmp_path / "vae.safetensors", vae)
    return tmp_path / "vae.safetensors"


def test_fixed_statistics_are_those_of_diffusers(vae):
    assert (tuple(vae.config.latents_mean), tuple(vae.config.latents_std)) == (
        LATENTS_MEAN["2.1"],
        LATENTS_STD["2.1"],
    )
    assert len(LATENTS_MEAN["2.2"]) == len(LATENTS_STD["2.2"]) == 48


def test_round_trip_in_official_keys(file, vae, clip, same):
    shapes = read_header(file).shapes
    assert shapes["decoder.head.0.gamma"] == (4, 1, 1, 1) and shapes["conv1.weight"] == (32, 32, 1, 1, 1)
    again = load_vae(file)
    assert (
        again.config.base_dim == 4
        and not again.training
        and not any(p.requires_grad for p in again.parameters())
    )
    same(again, vae, lambda vae: decode(vae, encode(vae, clip)))


@pytest.mark.parametrize("base", [4, 8])
def test_any_width_is_read_from_the_file(tmp_path, base):
    save_vae(tmp_path / "v.safetensors", AutoencoderKLWan(base_dim=base))
    assert load_vae(tmp_path / "v.safetensors").config.base_dim == base


def test_wan_22(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**SMALL_22).eval()
    save_vae(tmp_path / "v.safetensors", vae)
    assert (
        "decoder.upsamples.0.upsamples.3.time_conv.weight" in read_header(tmp_path / "v.safetensors").shapes
    )
    again = load_vae(tmp_path / "v.safetensors")
    assert {k: again.config[k] for k in SMALL_22} == SMALL_22 and stride(again) == (4, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values()))
    latents = encode(again, torch.zeros(1, 3, 5, 32, 16))
    assert latents.shape == (1, 48, 2, 2, 1) and decode(again, latents).shape == (1, 3, 5, 32, 16)


def test_diffusers_file_and_folder(vae, tmp_path):
    save_file(vae.state_dict(), tmp_path / "d.safetensors")
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    for path in (tmp_path / "d.safetensors", tmp_path / "pipe" / "vae", tmp_path / "pipe"):
        again = load_vae(path)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values()))


def test_encode_is_the_normalised_mean(vae, clip):
    raw = vae.encode(clip).latent_dist.mean
    latents = encode(vae, clip)
    assert latents.shape == (2, 16, 2, 2, 3) and latents.dtype == torch.float32
    c = 3
    expected = (raw[:, c] - LATENTS_MEAN["2.1"][c]) / LATENTS_STD["2.1"][c]
    torch.testing.assert_close(latents[:, c], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(denormalize(normalize(raw, vae), vae), raw, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(vae, latents), vae.decode(raw).sample, rtol=0, atol=1e-4)


def test_bf16_vae_gives_fp32(file, clip):
    vae = load_vae(file, torch.bfloat16)
    assert encode(vae, clip).dtype == torch.float32 and decode(vae, encode(vae, clip)).dtype == torch.float32


def test_fold_statistics_is_exact(vae, clip):
    folded = AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)
    folded.load_state_dict(vae.state_dict())
    before = vae.encode(clip).latent_dist
    mean, std = before.mean.mean(dim=(0, 2, 3, 4)), before.mean.std(dim=(0, 2, 3, 4))
    fold_statistics(folded, mean, std)
    after = folded.encode(clip).latent_dist

    torch.testing.assert_close(
        after.mean.mean(dim=(0, 2, 3, 4)), torch.tensor(LATENTS_MEAN["2.1"]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        after.mean.std(dim=(0, 2, 3, 4)), torch.tensor(LATENTS_STD["2.1"]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        folded.decode(after.mean).sample, vae.decode(before.mean).sample, rtol=0, atol=1e-4
    )
    # Samples follow the same map, so their reconstructions stay as well.
    noise = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.testing.assert_close(
        folded.decode(after.sample(noise[0])).sample,
        vae.decode(before.sample(noise[1])).sample,
        rtol=0,
        atol=1e-4,
    )
    normalised = encode(folded, clip)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3, 4)), torch.ones(16), rtol=0, atol=1e-5)


def test_fold_statistics_refuses(vae):
    ones = torch.ones(16)
    with pytest.raises(AptError, match="16 channels"):
        fold_statistics(vae, torch.ones(4), torch.ones(4))
    for bad in (0.0, float("nan")):
        with pytest.raises(AptError, match="channel 5"):
            fold_statistics(vae, ones, torch.where(torch.arange(16) == 5, bad, 1.0))


def test_save_refuses_other_statistics(tmp_path):
    with pytest.raises(AptError, match="fold_statistics"):
        save_vae(
            tmp_path / "v.safetensors",
            AutoencoderKLWan(base_dim=4, latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
        )
    assert not list(tmp_path.iterdir())


def test_sizes():
    check_size(720, 1280, 49, (4, 8, 8), (1, 2, 2))
    check_size(704, 1280, 121, (4, 16, 16), (1, 2, 2))
    check_size(8, 24, 1, patch=(1, 1, 1))


@pytest.mark.parametrize(
    "size, near",
    [
        ((720, 1280, 50), "frames 50 must be 4 n + 1 (49 or 53)"),
        ((720, 1281, 49), "width 1281 must be a multiple of 16 (1280 or 1296)"),
        ((725, 1280, 49), "height 725 must be a multiple of 16 (720 or 736)"),
        ((5, 16, 1), "height 5 must be a multiple of 16 (16)"),
        ((16, 16, 0), "frames 0 must be 4 n + 1 (1)"),
        (
            (50, 50, 8),
            "frames 8 must be 4 n + 1 (5 or 9), height 50 must be a multiple of 16 (48 or 64), width 50",
        ),
    ],
)
def test_wrong_sizes_name_the_nearest_right_ones(size, near):
    with pytest.raises(AptError) as caught:
        check_size(*size, what="clip.mp4")
    assert near in str(caught.value) and str(caught.value).startswith(
        f"clip.mp4 of {size[1]}x{size[0]} and {size[2]} frames"
    )


def test_720_lines_do_not_fit_the_22_vae():
    with pytest.raises(AptError, match="704 or 736"):
        check_size(720, 1280, 121, (4, 16, 16))


def test_encode_refuses_wrong_sizes(vae):
    with pytest.raises(AptError, match="5 or 9"):
        encode(vae, torch.zeros(1, 3, 6, 16, 16))
    with pytest.raises(AptError, match="width 20"):
        encode(vae, torch.zeros(1, 3, 1, 16, 20))


def spoil(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.pop("decoder.upsamples.3.time_conv.weight"),
            ["decoder.upsamples.3.time_conv.weight", "missing"],
        ),
        (lambda t: t.pop("decoder.head.0.gamma"), ["decoder.head.0.gamma", "missing"]),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("encoder.")], ["encoder.conv1", "missing"]),
        (lambda t: t.update({"loss.logvar": torch.ones(1)}), ["loss.logvar"]),
        (lambda t: t.update({"conv2.weight": torch.ones(16, 16)}), ["conv2.weight", "(16, 16)"]),
        (lambda t: t.update({"conv2.bias": torch.ones(4)}), ["4 latent channels"]),
        (lambda t: t["conv2.bias"].fill_(float("nan")), ["conv2.bias", "NaN"]),
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), ["not a Wan VAE"]),
    ],
)
def test_files_that_cannot_be_used(file, change, words):
    spoil(file, change)
    with pytest.raises(AptError) as caught:
        load_vae(file)
    message = str(caught.value)
    assert all(word in message for word in (str(file), *words)), message


def test_pickles_truncation_and_folders(file, vae, tmp_path):
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(AptError, match="truncated"):
        load_vae(file)
    torch.save(vae.state_dict(), file)
    with pytest.raises(AptError, match="pickle"):
        load_vae(file)
    with pytest.raises(AptError, match="config.json"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(AptError, match="AutoencoderKLWan"):
        load_vae(tmp_path)
