"""Load `model`, put `lora` on it at strength 1 as Load LoRA does, and run one step from `inputs` (noise,
text) into `out`.
"""

import json
import logging

from comfyui import start

paths, complaints = start()

import comfy.sample
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file, save_file


class NotLoaded(logging.Handler):
    def emit(self, record):
        if "not loaded" in record.getMessage().lower():
            complaints.lines.append(record.getMessage())


logging.getLogger().addHandler(NotLoaded())
with torch.inference_mode():
    patcher = comfy.sd.load_diffusion_model(paths["model"])
    lora = comfy.utils.load_torch_file(paths["lora"], safe_load=True)
    patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)
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
print(json.dumps({"complaints": complaints.lines, "patched": len(patcher.patches)}))
