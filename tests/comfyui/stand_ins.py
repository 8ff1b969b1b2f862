"""Small files in the places and under the names of the big ones, enough for ComfyUI to list them and to load
the transformers, and the miniature in fp32.

The stock loaders of UMT5-XXL and of Wan 2.2's VAE have fixed sizes, so these two stand-ins are lists of no
tensors: a prompt that names them validates, and would fail if it ran.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apt_core.files.checkpoint_header import read_metadata
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.models.vae import save_vae
from apt_core.models.wan import WanBackbone
from trainer.mini import ASSETS, GENERATOR

TINY = dict(num_attention_heads=1, attention_head_dim=128, text_dim=4096, ffn_dim=128, num_layers=1)
WAN21 = {
    "base": "wan2.1-t2v-1.3b",
    "text_length": 512,
    "vae": {"name": "wan2.1", "stride": [4, 8, 8], "channels": 16},
    "native": {"height": 480, "width": 832, "frames": 49, "fps": 24.0},
}
WAN22 = {
    "base": "wan2.2-ti2v-5b",
    "text_length": 512,
    "vae": {"name": "wan2.2", "stride": [4, 16, 16], "channels": 48},
    "native": {"height": 704, "width": 1280, "frames": 49, "fps": 24.0},
}


def make_stand_ins(models: Path) -> None:
    """Fill `models` (its folders are made) with what the graphs of example_workflows/ ask for."""
    torch.manual_seed(0)
    wan21, wan22 = WanBackbone(**TINY), WanBackbone(**TINY, in_channels=48, out_channels=48)
    folders = {name: models / name for name in ("diffusion_models", "loras", "text_encoders", "vae")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    diffusion = folders["diffusion_models"]
    save_generator(diffusion / "wan2.1_1.3B_apt.safetensors", wan21, wan21.config, WAN21, torch.float16)
    save_generator(diffusion / "wan2.2_5B_apt.safetensors", wan22, wan22.config, WAN22, torch.float16)
    for released in ("1.3B_fp16", "14B_fp8_scaled"):
        save_plain(
            diffusion / f"wan2.1_t2v_{released}.safetensors", diffusion / "wan2.1_1.3B_apt.safetensors"
        )
    mini = load_transformer(GENERATOR)
    save_generator(diffusion / "apt_mini_fp32.safetensors", mini, mini.config, read_metadata(GENERATOR))
    link_run(models, mini)
    pair = {"lora_A": torch.zeros(4, 128), "lora_B": torch.zeros(128, 4)}
    lora = {f"diffusion_model.blocks.0.self_attn.q.{name}.weight": value for name, value in pair.items()}
    save_file(
        lora,
        folders["loras"] / "wan2.1_1.3B_apt_lora.safetensors",
        {"apt": json.dumps({"format": 1, "kind": "lora", **WAN21})},
    )
    save_file(lora, folders["loras"] / "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors")
    save_vae(folders["vae"] / "wan_2.1_vae.safetensors", AutoencoderKLWan(base_dim=8).eval())
    save_file({}, folders["vae"] / "wan2.2_vae.safetensors")
    save_file({}, folders["text_encoders"] / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")


def link_run(models: Path, mini: WanBackbone) -> None:
    """models/apt/demo, a link to a folder as the trainer's demo leaves one, with its base: the distilled
    model is the miniature too, so that whoever compares them finds no difference.
    """
    run, apt = models.parent / "runs" / "demo", read_metadata(GENERATOR)
    for folder in ("latents", "states/image"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(ASSETS / "transformer.safetensors", run / "base.safetensors")
    shutil.copy(GENERATOR, run / "apt-mini.safetensors")
    save_generator(run / "distilled.safetensors", mini, mini.config, apt | {"phase": "distilled"})
    for data in ("latents/shard-00000", "latents/prompts", "states/image/differences"):
        save_file({"data": torch.zeros(1)}, run / f"{data}.safetensors")
    (models / "apt").mkdir(parents=True, exist_ok=True)
    (models / "apt" / "demo").symlink_to(run.resolve(), target_is_directory=True)


def save_plain(path: Path, source: Path) -> None:
    """A file as Wan itself is released: the tensors of `source` without any metadata, but for that which
    ComfyUI needs for odd shapes.
    """
    with safe_open(source, "pt") as file:
        config = {key: value for key, value in file.metadata().items() if key == "config"}
    save_file(load_file(source), path, config)
