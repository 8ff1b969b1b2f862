"""The files and the folder that are shipped, in stock ComfyUI: whole, silent, and with the same numbers."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from apt_core.method.generator import one_step
from apt_core.models.latents import denormalize, normalize
from apt_core.models.vae import decode, load_vae
from trainer.mini import ASSETS, VAE

ROOT = Path(__file__).parents[2]


def test_the_shipped_transformer_in_one_step(comfyui, tmp_path):
    file, vae = ASSETS / "transformer.safetensors", load_vae(VAE)
    torch.manual_seed(0)
    z = torch.randn(2, 16, 3, 6, 6)
    text = load_text_encoder(ASSETS / "text_encoder.safetensors").encode(
        ["a red circle moving left on a green background"]
    )[0][None]
    save_file({"noise": z, "text": text}, tmp_path / "in.safetensors")
    result = comfyui(
        "sample_transformer", model=file, inputs=tmp_path / "in.safetensors", out=tmp_path / "out.safetensors"
    )

    model = load_transformer(file)
    assert result == {
        "complaints": [],
        "differing": [],
        "detected": "WAN21_T2V",
        "num_heads": model.config.num_attention_heads,
    }
    with torch.no_grad():
        ours = one_step(model, z, text.expand(2, -1, -1))
    # ComfyUI hands latents out as the VAE has them.
    theirs = normalize(load_file(tmp_path / "out.safetensors")["latents"], vae)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_shipped_vae(comfyui, tmp_path):
    vae = load_vae(VAE)
    torch.manual_seed(0)
    pixels, latents = torch.rand(9, 48, 48, 3), torch.randn(1, 16, 3, 6, 6)
    save_file({"pixels": pixels, "latents": denormalize(latents, vae)}, tmp_path / "in.safetensors")
    result = comfyui("run_vae", vae=VAE, inputs=tmp_path / "in.safetensors", out=tmp_path / "out.safetensors")

    assert result == {"complaints": [], "module": "comfy.ldm.wan.vae", "dtype": "torch.float32"}
    with torch.no_grad():
        ours = (decode(vae, latents)[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    theirs = load_file(tmp_path / "out.safetensors")["pixels"]
    torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=0, atol=1e-3)


def test_the_pack_loads_in_silence(comfyui, tmp_path):
    pack = tmp_path / "custom_nodes" / "ComfyUI-APT"
    pack.mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, pack)
    for name in ("nodes", "apt_core", "example_workflows", "locales"):
        shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
    result = comfyui("load_pack", pack=pack)
    assert result.pop("seconds") < 0.2, "what the pack adds to ComfyUI's start"
    assert result == {
        "loaded": True,
        "warnings": [],
        "printed": "",
        "nodes": [
            "APTEmptyLatent",
            "APTLoadCheckpoint",
            "APTLoadPrompts",
            "APTLoadTextEncoder",
            "APTNoiseWalk",
            "APTSampler",
            "APTSaveCheckpoint",
            "APTVAEDecode",
            "APTVAEDecodeToVideo",
        ],
        "listed": {"diffusion_models": ["apt_mini.safetensors"], "vae": ["apt_mini_vae.safetensors"]},
        "saved to the same place": True,
        "models/apt": {"apt": True},
    }
