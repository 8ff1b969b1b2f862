"""APT VAE Decode against stock VAEDecode, bit by bit, with the Wan VAEs `vae_21` and `vae_22` (in small) and
a VAE of another kind.
"""

import json

from comfyui import start

paths, _ = start()

import numpy as np
import torch
from decoding import Calls, Progress, load_nodes, load_small_vae_22, load_vae, random_tiny_autoencoder, stock

APTVAEDecode, _ = load_nodes(paths["pack"])


def compare(vae, latent: torch.Tensor) -> dict:
    # Clips alone: stock's bits for one clip depend on how many others fit into memory beside it.
    theirs = torch.cat([stock(vae, clip) for clip in latent.split(1)])
    together = stock(vae, latent)
    progress, calls = Progress(), Calls(vae.first_stage_model.decoder)
    ours = APTVAEDecode.execute(vae, {"samples": latent}).args[0]
    calls.hook.remove()
    last = (theirs.split(progress.values[0])[0][-1, ..., :3] * 255).byte()
    return {
        "shape": list(ours.shape),
        "equal": torch.equal(ours, theirs) and ours.dtype == theirs.dtype,
        "like stock": list(ours.shape) == list(together.shape)
        and (ours - together).abs().max().item() < 1e-4,
        "has contrast": theirs.std().item() > 0.02
        and ((theirs > 0) & (theirs < 1)).float().mean().item() > 0.9,
        "progress": progress.values,
        "total": list(progress.totals),
        "calls": calls.count,
        "previews": sum(preview[0] == "JPEG" for preview in progress.previews),
        "first preview is the last frame so far": np.array_equal(
            np.asarray(progress.previews[0][1]), last.numpy()
        ),
    }


torch.manual_seed(0)
with torch.inference_mode():
    vae_21, vae_22 = load_vae(paths["vae_21"]), load_small_vae_22(paths["vae_22"], 8, 12)
    result = {
        f"2.1 {batch}x{f}": compare(vae_21, torch.randn(batch, 16, f, 3, 2))
        for batch, f in ((1, 1), (1, 2), (1, 3), (1, 5), (2, 3), (3, 1))
    }
    result |= {
        f"2.2 {batch}x{f}": compare(vae_22, torch.randn(batch, 48, f, 2, 3))
        for batch, f in ((1, 1), (1, 3), (2, 2))
    }

    tiny, latent = random_tiny_autoencoder(), torch.randn(2, 16, 3, 4, 4)
    progress = Progress()
    result["tiny autoencoder"] = {
        "equal": torch.equal(APTVAEDecode.execute(tiny, {"samples": latent}).args[0], stock(tiny, latent)),
        "progress": progress.values,
    }

    # A ComfyUI to come, whose decoder takes something else.
    decoder = vae_21.first_stage_model.decoder
    known = decoder.forward
    decoder.forward = lambda x, feat_cache=None, feat_idx=[0], more=None: known(x, feat_cache, feat_idx)
    latent, progress = torch.randn(1, 16, 3, 2, 2), Progress()
    result["another decoder"] = {
        "equal": torch.equal(
            APTVAEDecode.execute(vae_21, {"samples": latent}).args[0], stock(vae_21, latent)
        ),
        "progress": progress.values,
    }
print(json.dumps(result))
