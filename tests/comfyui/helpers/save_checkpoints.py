"""Save APT Checkpoint: each of MODELS is sampled, saved, loaded and sampled again; latents go into `out`."""

import json
import os
from types import SimpleNamespace

from comfyui import start

paths, _ = start()

import folder_paths
import torch
from apt_nodes import load_nodes, offer, sentence, show_on_nodes
from comfy_extras.nodes_model_merging import ModelMergeSimple
from safetensors.torch import load_file, save_file

import nodes

apt = load_nodes(paths["pack"])
offer(paths["files"], "diffusion_models", "loras")
folder_paths.set_output_directory(paths["saved"])
offer(os.path.join(paths["saved"], "diffusion_models"), "diffusion_models")
cond = [[load_file(paths["inputs"])["text"], {}]]
shown = show_on_nodes(apt)


def sample(model) -> torch.Tensor:
    return apt.APTSampler.execute(model, cond, {"samples": torch.zeros(1, 16, 2, 6, 4)}, 0, 1).args[0][
        "samples"
    ]


def load(name: str):
    return apt.APTLoadCheckpoint.execute(f"{name}.safetensors", "default").args[0]


def stock(name: str):
    return nodes.UNETLoader().load_unet(f"{name}.safetensors", "default")[0]


def lora(model, name: str, strength: float = 1.0):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{name}.safetensors", strength)[0]


def merge(one, other):
    return ModelMergeSimple().merge(one, other, 0.25)[0]


def save(model, name: str, dtype: str = "default"):
    return apt.APTSaveCheckpoint.execute(model, f"diffusion_models/{name}", dtype)


MODELS = {
    "plain bf16": lambda: load("bf16"),
    "lora": lambda: lora(load("fp32"), "style", 0.7),
    "lora bf16": lambda: lora(load("bf16"), "style", 0.7),
    "merge": lambda: merge(load("fp32"), load("another")),
    "merge fp16 and lora": lambda: lora(merge(load("fp16"), load("another")), "style"),
    "base and apt lora": lambda: lora(load("base"), "apt lora"),
    "nameless base and apt lora": lambda: lora(stock("nameless"), "apt lora"),
    "stock": lambda: lora(stock("fp32"), "style"),
    "fp8": lambda: lora(apt.APTLoadCheckpoint.execute("fp32.safetensors", "fp8_e4m3fn").args[0], "style"),
    "scaled": lambda: lora(load("scaled"), "style"),
}

with torch.inference_mode():
    latents = {}
    for name, make in MODELS.items():
        save(make(), f"{name} unused")  # before it was ever on a device
        model = make()
        latents[f"{name}, in memory"] = sample(model)
        save(model, name)
        latents[f"{name}, again in memory"] = sample(model)
        latents[f"{name}, saved"] = sample(load(f"{name}_00001_"))
    for dtype in ("fp32", "bf16", "fp16"):
        save(MODELS["lora"](), f"as {dtype}", dtype)
        save(MODELS["scaled"](), f"scaled as {dtype}", dtype)
        latents[f"scaled as {dtype}, saved"] = sample(load(f"scaled as {dtype}_00001_"))
    save_file({name: value.contiguous() for name, value in latents.items()}, paths["out"])

    shown.clear()
    model = MODELS["lora"]()
    apt.APTSaveCheckpoint.hidden = SimpleNamespace(
        unique_id="7", prompt={"1": "a node"}, extra_pnginfo={"workflow": {"nodes": []}, "apt": 1}
    )
    output = save(model, "lora")
    elsewhere = apt.APTSaveCheckpoint.execute(model, "elsewhere/lora", "default").ui.as_dict()["text"][0]
    bypassed = load("fp32")
    bypassed.set_injections("bypass_lora", [None])
    result = {
        "said": output.ui.as_dict()["text"][0],
        "shown": shown[0],
        "attached": model.get_attachment("apt"),
        "outputs": output.args,
        "elsewhere": elsewhere,
        "no metadata": sentence(save, stock("nameless"), "x"),
        "no metadata, our loader": sentence(save, load("nameless"), "x"),
        "bypass": sentence(save, bypassed, "x"),
        "outside": sentence(apt.APTSaveCheckpoint.execute, model, "../x", "default"),
        "no name": sentence(apt.APTSaveCheckpoint.execute, model, "diffusion_models/", "default"),
        "empty": sentence(apt.APTSaveCheckpoint.execute, model, "", "default"),
        "too large for fp16": sentence(save, load("large"), "x", "fp16"),
        "blocked": sentence(apt.APTSaveCheckpoint.execute, model, "blocked/x", "default"),
    }
print(json.dumps(result))
