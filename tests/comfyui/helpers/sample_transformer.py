"""Load `model` as Load Diffusion Model does and run KSampler's own function for one step from `inputs`
(noise, text) into `out`.
"""

import json

from comfyui import one_step, start

paths, complaints = start()

import comfy.sd
import torch
from safetensors.torch import load_file

with torch.inference_mode():
    patcher = comfy.sd.load_diffusion_model(paths["model"])
    net = patcher.model.diffusion_model
    file, loaded = load_file(paths["model"]), net.state_dict()
    differing = [
        key
        for key in file.keys() | loaded.keys()
        if not (key in file and key in loaded and torch.equal(file[key], loaded[key].cpu()))
    ]
    one_step(patcher, paths)
    result = {
        "complaints": complaints.lines,
        "differing": differing,
        "detected": type(patcher.model.model_config).__name__,
        "num_heads": net.num_heads,
    }
print(json.dumps(result))
