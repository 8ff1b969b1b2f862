"""Stock ComfyUI loads our LoRA files, every weight of them, and computes what the merged model computes; and
we merge others' files as it does."""

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tiny_models import tiny_wan_16

from apt_core.loading.checkpoint import save_generator
from apt_core.method.generator import one_step
from apt_core.models.latents import normalize
from apt_core.models.lora import add_adapters, merged_state, role, save_lora
from apt_core.models.lora_files import merge, read_lora_for

EVERY_LAYER = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out", "time_proj"]
EVERY_LAYER += [
    "time_embedder.linear_1",
    "time_embedder.linear_2",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
]


def test_one_step_with_a_lora(comfyui, tmp_path):
    model = tiny_wan_16()
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


def test_a_foreign_lora_is_merged_as_comfyui_does(comfyui, tmp_path):
    """Two forms of names in one file, ranks 2 and 5, alphas, and whole differences of weights and biases.

    Not of modulation tables: ComfyUI 0.33 takes their `diff` for loaded, but leaves out the own weights of a
    module that has layers inside (ModelPatcher._load_list).
    """
    model = tiny_wan_16()
    z, text = torch.randn(2, 16, 3, 6, 8), torch.randn(1, 7, 20)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("model", "lora", "inputs", "out")}
    save_generator(files["model"], model, model.config, {"kind": "base"})
    tensors, targets = {}, set()
    for name, p in model.named_parameters():
        official = model.official_name(name)
        layer, rank = "diffusion_model." + official.removesuffix(".weight"), 5
        if p.ndim == 2:
            if ".self_attn." in official:
                layer, rank = "lora_unet_" + official.removesuffix(".weight").replace(".", "_"), 2
            tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, p.shape[1])
            tensors[f"{layer}.lora_up.weight"] = torch.randn(p.shape[0], rank) / 8
            tensors[f"{layer}.alpha"] = torch.tensor(1.5)
        elif official.endswith(("norm_q.weight", "norm3.weight", "patch_embedding.weight")):
            tensors[f"{layer}.diff"] = torch.randn_like(p) / 4
        elif official.endswith(("norm3.bias", "ffn.2.bias", "head.head.bias")):
            tensors[f"{layer.removesuffix('.bias')}.diff_b"] = torch.randn_like(p) / 4
        else:
            continue
        targets.add(official)
    save_file(tensors, files["lora"])
    save_file({"noise": z, "text": text}, files["inputs"])
    result = comfyui("sample_lora", **files)

    lora = read_lora_for(files["lora"], model, files["model"])
    assert result == {"complaints": [], "patched": len(targets)} and set(lora.targets) == targets
    with torch.no_grad():
        base = one_step(model, z, text.expand(2, -1, -1))
        ours = one_step(merge(model, lora.load()), z, text.expand(2, -1, -1))
    theirs = normalize(load_file(files["out"])["latents"], AutoencoderKLWan(base_dim=4))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - base).abs().mean() > 0.05
