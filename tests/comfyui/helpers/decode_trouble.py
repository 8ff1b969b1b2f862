"""The decode nodes when something is in the way: a cancel, no memory, a full disk, latents and numbers that
do not fit. Wan VAE: `vae`.
"""

import json
import os
import resource
import signal

from comfyui import start

paths, _ = start()

import comfy.model_management
import comfy.nested_tensor
import comfy.sd
import folder_paths
import torch
from decoding import Calls, Progress, load_nodes, load_vae, stock

APTVAEDecode, APTVAEDecodeToVideo = load_nodes(paths["pack"])
TEMP = folder_paths.get_temp_directory()
os.makedirs(TEMP, exist_ok=True)


def sentence(node, *inputs) -> str:
    try:
        node.execute(*inputs)
    except ValueError as error:
        return f"{type(error).__name__} {error}".replace(TEMP, "TEMP")
    return "nothing was raised"


def cancelled(node, *more) -> dict:
    Progress(cancel_after=1)
    calls = Calls(vae.first_stage_model.decoder)
    try:
        node.execute(vae, clip, *more)
        outcome = "went on"
    except comfy.model_management.InterruptProcessingException:
        outcome = "cancelled"
    calls.hook.remove()
    return {"outcome": outcome, "calls": calls.count, "files": os.listdir(TEMP)}


def without_memory(node, *more):
    """At the second slice, and in stock's own attempt: both then decode in tiles."""
    calls = Calls(vae.first_stage_model.decoder, fails=lambda call, x: call > 1 and x.shape[-1] > 32)
    output = node.execute(vae, wide, *more).args[0]
    expected = stock(vae, wide["samples"])
    calls.hook.remove()
    return output, expected


torch.manual_seed(0)
with torch.inference_mode():
    vae = load_vae(paths["vae"])
    clip, wide = {"samples": torch.randn(1, 16, 5, 2, 2)}, {"samples": torch.randn(1, 16, 3, 2, 34)}
    result = {"cancel": {"images": cancelled(APTVAEDecode), "video": cancelled(APTVAEDecodeToVideo, 24.0)}}

    images, expected = without_memory(APTVAEDecode)
    video, _ = without_memory(APTVAEDecodeToVideo, 24.0)
    result["no memory"] = {
        "equal": torch.equal(images, expected),
        "tiled": not torch.equal(images, stock(vae, wide["samples"])),
        "frames": video.get_frame_count(),
        "files": len(os.listdir(TEMP)),
    }
    os.unlink(video.get_stream_source())

    image_vae = load_vae(paths["vae"])
    image_vae.latent_dim, image_vae.latent_channels, image_vae.first_stage_model = 2, 4, torch.nn.Identity()
    sound_vae = load_vae(paths["vae"])
    sound_vae.output_channels, sound_vae.first_stage_model = 2, torch.nn.Identity()
    result["sentences"] = {
        "channels": sentence(APTVAEDecode, vae, {"samples": torch.zeros(1, 48, 3, 2, 2)}),
        "image latent": sentence(APTVAEDecode, vae, {"samples": torch.zeros(1, 16, 4, 4)}),
        "audio": sentence(
            APTVAEDecodeToVideo, vae, {"samples": torch.zeros(1, 16, 128), "type": "audio"}, 24.0
        ),
        "image vae": sentence(APTVAEDecode, image_vae, {"samples": torch.zeros(1, 16, 3, 2, 2)}),
        "sound vae": sentence(
            APTVAEDecodeToVideo, sound_vae, {"samples": torch.zeros(1, 64, 22), "type": "audio"}, 24.0
        ),
        "fps 0": sentence(APTVAEDecodeToVideo, vae, clip, 0.0),
        "fps nan": sentence(APTVAEDecodeToVideo, vae, clip, float("nan")),
    }

    nested = comfy.nested_tensor.NestedTensor([clip["samples"], torch.zeros(1, 8, 20, 16)])
    result["nested"] = torch.equal(APTVAEDecode.execute(vae, {"samples": nested}).args[0], stock(vae, nested))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    result["sentences"]["disk full"] = sentence(APTVAEDecodeToVideo, vae, clip, 24.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result["left behind"] = os.listdir(TEMP)
print(json.dumps(result))
