"""The fp8 export in stock ComfyUI: loaded whole, unpacked with its scales, and computing what the unpacked
weights compute.
"""

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tiny_models import tiny_wan_16

from apt_core.method.generator import one_step
from apt_core.models.latents import normalize
from trainer.checkpoints.export import FP8, save_fp8


def test_one_step_of_a_tiny_fp8_generator(comfyui, tmp_path):
    model = tiny_wan_16()
    save_fp8(tmp_path / "g.safetensors", model, {"base": "test"})
    z, text = torch.randn(2, 16, 3, 6, 8), torch.randn(1, 7, 20)
    save_file({"noise": z, "text": text}, tmp_path / "in.safetensors")
    result = comfyui(
        "sample_transformer",
        model=tmp_path / "g.safetensors",
        inputs=tmp_path / "in.safetensors",
        out=tmp_path / "out.safetensors",
    )
    assert (result["complaints"], result["detected"], result["num_heads"]) == ([], "WAN21_T2V", 2)

    with torch.no_grad():
        exact = one_step(model, z, text.expand(2, -1, -1))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
                scale = module.weight.abs().max() / torch.finfo(FP8).max
                module.weight.copy_((module.weight / scale).to(FP8).float() * scale)
        unpacked = one_step(model, z, text.expand(2, -1, -1))
    # ComfyUI hands latents out as the VAE has them.
    theirs = normalize(load_file(tmp_path / "out.safetensors")["latents"], AutoencoderKLWan(base_dim=4))
    assert (theirs - unpacked).norm() / unpacked.norm() < 0.01  # ComfyUI computes in bf16
    assert (unpacked - exact).abs().max() > 1e-3  # the scales matter: plain weights would be far away
