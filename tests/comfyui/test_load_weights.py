"""Stock ComfyUI loads the weights that this project writes, whole, and computes the same from them."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_wan_16

from apt_core.files import keys
from apt_core.loading.checkpoint import save_generator
from apt_core.method.generator import one_step
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD, normalize
from apt_core.models.vae import decode, encode, save_vae
from trainer.bench.shapes import VAE_CONFIGS


@pytest.mark.parametrize("heads, head_dim", [(2, 24), (1, 128), (1, 192)])
def test_one_step_of_a_tiny_generator(comfyui, tmp_path, heads, head_dim):
    model = tiny_wan_16(num_attention_heads=heads, attention_head_dim=head_dim)
    save_generator(tmp_path / "g.safetensors", model, model.config, {"base": "test"})
    z, text = torch.randn(2, 16, 3, 6, 8), torch.randn(1, 7, 20)
    save_file({"noise": z, "text": text}, tmp_path / "in.safetensors")
    result = comfyui(
        "sample_transformer",
        model=tmp_path / "g.safetensors",
        inputs=tmp_path / "in.safetensors",
        out=tmp_path / "out.safetensors",
    )

    assert result == {"complaints": [], "differing": [], "detected": "WAN21_T2V", "num_heads": heads}
    with torch.no_grad():
        ours = one_step(model, z, text.expand(2, -1, -1))
    # ComfyUI hands latents out as the VAE has them.
    theirs = normalize(load_file(tmp_path / "out.safetensors")["latents"], AutoencoderKLWan(base_dim=4))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_small_vae(comfyui, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=12).eval().requires_grad_(False)
    save_vae(tmp_path / "vae.safetensors", vae)
    pixels, latents = torch.rand(9, 48, 32, 3), torch.randn(1, 16, 3, 6, 4)
    raw = latents * torch.tensor(LATENTS_STD["2.1"]).view(-1, 1, 1, 1) + torch.tensor(
        LATENTS_MEAN["2.1"]
    ).view(-1, 1, 1, 1)
    save_file({"pixels": pixels, "latents": raw}, tmp_path / "in.safetensors")
    result = comfyui(
        "run_vae",
        vae=tmp_path / "vae.safetensors",
        inputs=tmp_path / "in.safetensors",
        out=tmp_path / "out.safetensors",
    )

    assert result == {"complaints": [], "module": "comfy.ldm.wan.vae", "dtype": "torch.float32"}
    theirs = load_file(tmp_path / "out.safetensors")
    clip = pixels.permute(3, 0, 1, 2)[None] * 2 - 1
    torch.testing.assert_close(normalize(theirs["latents"], vae), encode(vae, clip), rtol=0, atol=1e-4)
    ours = (decode(vae, latents)[0].permute(1, 2, 3, 0) + 1) / 2
    torch.testing.assert_close(theirs["pixels"].reshape(ours.shape), ours, rtol=0, atol=1e-4)


def test_our_official_names_are_comfyuis(comfyui):
    with torch.device("meta"):
        small = dict(num_attention_heads=2, num_layers=2, ffn_dim=64)
        ours = {
            "t2v": WanTransformer3DModel(**small),
            "i2v": WanTransformer3DModel(
                **small, in_channels=36, image_dim=1280, added_kv_proj_dim=256, pos_embed_seq_len=514
            ),
            "vae 2.1": AutoencoderKLWan(),
            "vae 2.2": AutoencoderKLWan(**VAE_CONFIGS["2.2"]),
        }
    theirs = comfyui("official_names")
    for name, model in ours.items():
        rename = (
            (lambda key: keys.vae_to_official(key, name[-3:]))
            if name.startswith("vae")
            else keys.transformer_to_official
        )
        assert {rename(key): list(value.shape) for key, value in model.state_dict().items()} == theirs[
            name
        ], name
