"""The decode nodes in a real ComfyUI: stock VAEDecode's numbers, slice by slice."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from apt_core.models.vae import save_vae
from trainer.bench.shapes import VAE_CONFIGS

PACK = Path(__file__).parents[2]


@pytest.fixture
def random_vae(tmp_path):
    def make(name: str, **config) -> Path:
        torch.manual_seed(1)
        save_vae(tmp_path / name, AutoencoderKLWan(**config).requires_grad_(False))
        return tmp_path / name

    return make


def test_images_are_stock_vae_decodes(comfyui, random_vae):
    vaes = {
        "vae_21": random_vae("21.safetensors", base_dim=8),
        "vae_22": random_vae(
            "22.safetensors", **VAE_CONFIGS["2.2"] | {"base_dim": 8, "decoder_base_dim": 12}
        ),
    }
    result = comfyui("decode_images", pack=PACK, **vaes)

    for name in ("tiny autoencoder", "another decoder"):
        assert result.pop(name) == {"equal": True, "progress": []}, name
    # Frames after each slice: stock cuts Wan 2.1's latents into 1, 2, 2, ... and Wan 2.2's into single
    # frames.
    expected = {
        "2.1 1x1": ([1, 24, 16, 3], [1]),
        "2.1 1x2": ([5, 24, 16, 3], [1, 5]),
        "2.1 1x3": ([9, 24, 16, 3], [1, 9]),
        "2.1 1x5": ([17, 24, 16, 3], [1, 9, 17]),
        "2.1 2x3": ([18, 24, 16, 3], [1, 9, 10, 18]),
        "2.1 3x1": ([3, 24, 16, 3], [1, 2, 3]),
        "2.2 1x1": ([1, 32, 48, 3], [1]),
        "2.2 1x3": ([9, 32, 48, 3], [1, 5, 9]),
        "2.2 2x2": ([10, 32, 48, 3], [1, 5, 6, 10]),
    }
    assert result == {
        name: {
            "shape": shape,
            "equal": True,
            "like stock": True,
            "has contrast": True,
            "progress": progress,
            "total": [shape[0]],
            "calls": len(progress),
            "previews": len(progress),
            "first preview is the last frame so far": True,
        }
        for name, (shape, progress) in expected.items()
    }


def test_a_video_file_holds_the_frames(comfyui, random_vae):
    result = comfyui("decode_video", pack=PACK, vae=random_vae("vae.safetensors", base_dim=8))

    assert result["folder"] and result["shape"] == [18, 64, 96, 3]
    assert (result["fps"], result["duration"]) == (12.5, pytest.approx(18 / 12.5))
    assert (result["progress"], result["previews"]) == ([1, 9, 10, 18], 4)
    # Codec noise, and no more of it than in a stock file: that one truncates to bytes, which costs half a
    # level.
    assert result["mean error"] < min(result["stock's mean error"], result["frame to frame"] / 8)
    # Save Video copies the stream and embeds the graph. 13: sRGB.
    assert result["saved"] == {"metadata": '{"1": "a graph"}', "colours": 13, "copied": True}
    assert result["odd"] == [[23, 15], 5] and result["files"] == 2

    latents, clip = 4 * 28 * 4 * 4 * 16, 4 * 4 * 28 * 32 * 32 * 3
    short, long = result["held"]["video"]
    assert 0 <= long - short <= 2 * latents
    short, long = result["held"]["images"]
    assert 0 <= long - short - clip <= 2 * latents, "the images once, and no more"


def test_in_trouble(comfyui, random_vae):
    result = comfyui("decode_trouble", pack=PACK, vae=random_vae("vae.safetensors", base_dim=8))

    stopped = {"outcome": "cancelled", "calls": 1, "files": []}
    assert result["cancel"] == {"images": stopped, "video": stopped}
    assert result["no memory"] == {"equal": True, "tiled": True, "frames": 9, "files": 1}
    assert result["nested"] and result["left behind"] == []
    fits = "load the VAE that belongs to the model, Wan 2.1's for 16 channels and Wan 2.2's for 48."
    this_vae = f"but this VAE takes [batch, 16, frames, height, width]: {fits}"
    assert result["sentences"] == {
        "channels": f"AptError APT VAE Decode: the latent is [1, 48, 3, 2, 2], {this_vae}",
        "image latent": f"AptError APT VAE Decode: the latent is [1, 16, 4, 4], {this_vae}",
        "audio": f"AptError APT VAE Decode to Video: the latent is [1, 16, 128], {this_vae}",
        "image vae": (
            f"AptError APT VAE Decode: the latent is [1, 16, 3, 2, 2], but this VAE takes 4 channels: {fits}"
        ),
        "sound vae": (
            "AptError APT VAE Decode to Video: this VAE (Identity) makes sound or solids, not images: "
            "load the VAE that belongs to the video model."
        ),
        "fps 0": (
            "AptError APT VAE Decode to Video: fps is 0, but a video needs 1 to 120 frames per second: "
            "24 is the rate of APT's video models."
        ),
        "fps nan": (
            "AptError APT VAE Decode to Video: fps is nan, but a video needs 1 to 120 frames per second: "
            "24 is the rate of APT's video models."
        ),
        "disk full": (
            "AptError APT VAE Decode to Video: the video cannot be written to TEMP (File too large): "
            "free room there, or start ComfyUI with another --temp-directory."
        ),
    }
