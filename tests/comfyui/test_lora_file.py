"""Stock ComfyUI loads our LoRA files, every weight of them, and computes what the merged model computes."""

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from apt_core.loading.checkpoint import save_generator
from apt_core.method.generator import one_step
from apt_core.models.lora import add_adapters, merged_state, role, save_lora
from apt_core.models.vae import normalize
from apt_core.models.wan import WanBackbone

EVERY_LAYER = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out", "time_proj"]
EVERY_LAYER += ["time_embedder.linear_1", "time_embedder.linear_2", "text_embedder.linear_1", "text_embedder.linear_2"]


def test_one_step_with_a_lora(comfyui, tmp_path):
    torch.manual_seed(0)
    model = WanBackbone(num_attention_heads=2, attention_head_dim=24, text_dim=20, freq_dim=32, ffn_dim=80, num_layers=3)
    add_adapters(model, ["generator", "discriminator"], rank=4, alpha=2.0, targets=EVERY_LAYER)
    with torch.no_grad():
        for p in role(model, "generator").parameters():
            p.normal_(std=0.3)
    z, text = torch.randn(2, 16, 3, 6, 8), torch.randn(1, 7, 20)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("model", "lora", "inputs", "out")}
    save_generator(files["model"], merged_state(model, None), model.config, {"kind": "base"})
    save_lora(files["lora"], model, "generator", {"base": "test"})
    save_file({"noise": z, "text": text}, files["inputs"])
    result = comfyui("sample_lora", **files)

    assert result == {"complaints": [], "patched": 3 * 10 + 6}
    with torch.no_grad():
        ours, base = (one_step(role(model, name), z, text.expand(2, -1, -1)) for name in ("generator", None))
    theirs = normalize(load_file(files["out"])["latents"], AutoencoderKLWan(base_dim=4))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - base).abs().mean() > 0.05
