"""Load `model` as Load Diffusion Model does and run KSampler's own function for one step from `inputs`
(noise, text) into `out`.
"""

import json

from comfyui import start

paths, complaints = start()

import comfy.sample
import comfy.sd
import torch
from safetensors.torch import load_file, save_file

with torch.inference_mode():
    patcher = comfy.sd.load_diffusion_model(paths["model"])
    net = patcher.model.diffusion_model
    file, loaded = load_file(paths["model"]), net.state_dict()
    differing = [
        key
        for key in file.keys() | loaded.keys()
        if not (key in file and key in loaded and torch.equal(file[key], loaded[key].cpu()))
    ]
    inputs = load_file(paths["inputs"])
    cond = [[inputs["text"], {}]]
    sample = comfy.sample.sample(
        patcher,
        inputs["noise"],
        1,
        1.0,
        "euler",
        "simple",
        cond,
        cond,
        torch.zeros_like(inputs["noise"]),
        denoise=1.0,
        seed=0,
    )
    save_file({"latents": sample.float().contiguous()}, paths["out"])
    result = {
        "complaints": complaints.lines,
        "differing": differing,
        "detected": type(patcher.model.model_config).__name__,
        "num_heads": net.num_heads,
    }
print(json.dumps(result))
