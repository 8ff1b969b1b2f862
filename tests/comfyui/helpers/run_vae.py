"""Load `vae` as Load VAE does, encode and decode what `inputs` (pixels, latents; ComfyUI's layout) holds into
`out`.
"""

import json

from comfyui import start

paths, complaints = start()

import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file, save_file

with torch.inference_mode():
    state, metadata = comfy.utils.load_torch_file(paths["vae"], return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    vae.throw_exception_if_invalid()
    inputs = load_file(paths["inputs"])
    save_file(
        {
            "latents": vae.encode(inputs["pixels"]).contiguous(),
            "pixels": vae.decode(inputs["latents"]).contiguous(),
        },
        paths["out"],
    )
print(
    json.dumps(
        {
            "complaints": complaints.lines,
            "module": type(vae.first_stage_model).__module__,
            "dtype": str(vae.vae_dtype),
        }
    )
)
