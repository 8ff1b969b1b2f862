"""Empty APT Latent for the models in `files`, and what ComfyUI's check of a prompt says to bad values."""

import asyncio
import json

from comfyui import start

paths, _ = start()

import execution
import torch
from apt_nodes import load_nodes, offer, sentence, show_on_nodes

import nodes

apt = load_nodes(paths["pack"])
on_node = show_on_nodes(apt)
offer(paths["files"], "diffusion_models", "loras")


def custom(width: int, height: int, frames: int) -> dict:
    return {"size": "custom", "width": width, "height": height, "frames": frames}


def make(model, size: dict, batch: int = 1) -> list:
    latent, fps = apt.APTEmptyLatent.execute(model, size, batch).args
    ratios = latent.pop("downscale_ratio_spacial"), latent.pop("downscale_ratio_temporal")
    assert latent.keys() == {"samples"} and latent["samples"].count_nonzero() == 0
    return [list(latent["samples"].shape), fps, *ratios]


def validated(**inputs) -> list[str]:
    """What the server answers to a prompt with these values."""
    size = {name.replace("__", "."): value for name, value in inputs.items() if name != "seeds"}
    links = {"model": ["model", 0], "positive": ["text", 0], "latent": ["latent", 0], "noise": ["walk", 0]}
    prompt = {
        "model": {
            "class_type": "APTLoadCheckpoint",
            "inputs": {"checkpoint": "apt_mini.safetensors", "weight_dtype": "default"},
        },
        "clip": {"class_type": "APTLoadTextEncoder", "inputs": {"text_encoder": "apt_mini_text_encoder"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a red circle"}},
        "latent": {
            "class_type": "APTEmptyLatent",
            "inputs": {"model": ["model", 0], "batch_size": 1, "size": "native"} | size,
        },
        "walk": {
            "class_type": "APTNoiseWalk",
            "inputs": {"seeds": inputs.get("seeds", "1, 2"), "closed": False},
        },
        "samples": {"class_type": "APTSampler", "inputs": links | {"seed": 0, "steps": 1}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["samples", 0], "filename_prefix": "x"}},
    }
    _, _, _, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    return [
        f"{error['message']}: {error['details']}" for entry in errors.values() for error in entry["errors"]
    ]


with torch.inference_mode():
    models = {
        name: nodes.UNETLoader().load_unet(f"{name}.safetensors", "default")[0]
        for name in ("wan 2.1", "wan 2.2", "released")
    }
    models["mini by the stock loader"] = nodes.UNETLoader().load_unet("apt_mini.safetensors", "default")[0]
    models["trained by the stock loader"] = nodes.UNETLoader().load_unet("trained.safetensors", "default")[0]
    models["trained"] = apt.APTLoadCheckpoint.execute("trained.safetensors", "default").args[0]
    models["mini"] = apt.APTLoadCheckpoint.execute("apt_mini.safetensors", "default").args[0]
    models["wan 2.1 with LoRA"] = nodes.LoraLoaderModelOnly().load_lora_model_only(
        models["wan 2.1"], "lora.safetensors", 1.0
    )[0]
    models["mini with LoRA"] = nodes.LoraLoaderModelOnly().load_lora_model_only(
        models["mini"], "lora.safetensors", 1.0
    )[0]
    presets = ("native", "image 1024", "video 1280x720, 2 s")
    broken = models["wan 2.1"].clone()
    broken.set_attachments("lora_metadata", {"apt": '{"native": 5}'})

    sizes, shown = {}, {}
    for name, model in models.items():
        on_node.clear()
        sizes[name] = [make(model, {"size": preset}) for preset in presets]
        if on_node:
            shown[name] = list(on_node)

    result = {
        "sizes": sizes,
        "shown": shown,
        "custom": {
            "smallest": make(models["wan 2.1"], custom(16, 16, 1)),
            "batch": make(models["mini"], custom(64, 32, 13), 4),
            "wan 2.2": make(models["wan 2.2"], custom(96, 64, 5)),
        },
        "sentences": {
            name: sentence(apt.APTEmptyLatent.execute, models[model], custom(*size), 1)
            for name, (model, size) in {
                "width": ("wan 2.1", (1000, 720, 49)),
                "720 on the 5B": ("wan 2.2", (1280, 720, 49)),
                "frames": ("mini", (48, 48, 18)),
                "more frames": ("mini", (48, 48, 20)),
                "tiny": ("wan 2.2", (8, 32, 2)),
            }.items()
        }
        | {
            "LoRA": sentence(make, broken, {"size": "native"}),
            "unknown": sentence(apt.APTEmptyLatent.execute, models["mini"], batch_size=1),
        },
        "validated": {
            "right": validated(),
            "width": validated(size="custom", size__width=8, size__height=64, size__frames=5),
            "batch": validated(batch_size=0),
            "seeds": validated(seeds="1 2"),
        },
    }
print(json.dumps(result))
