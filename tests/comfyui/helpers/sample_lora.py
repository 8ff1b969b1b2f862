"""Load `model`, put `lora` on it at strength 1 as Load LoRA does, and run one step from `inputs` (noise,
text) into `out`.
"""

import json
import logging

from comfyui import one_step, start

paths, complaints = start()

import comfy.sd
import comfy.utils
import torch


class NotLoaded(logging.Handler):
    def emit(self, record):
        if "not loaded" in record.getMessage().lower():
            complaints.lines.append(record.getMessage())


logging.getLogger().addHandler(NotLoaded())
with torch.inference_mode():
    patcher = comfy.sd.load_diffusion_model(paths["model"])
    lora = comfy.utils.load_torch_file(paths["lora"], safe_load=True)
    patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)
    one_step(patcher, paths)
print(json.dumps({"complaints": complaints.lines, "patched": len(patcher.patches)}))
