"""What the checks of the decode nodes share: the pack, VAEs, and a recorder of progress. `start()` must have
run.
"""

import asyncio

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan import vae2_2
from comfy.taesd.taehv import TAEHV

import nodes


def load_nodes(pack: str):
    """The classes APTVAEDecode and APTVAEDecodeToVideo as ComfyUI registers them from the pack."""
    assert asyncio.run(nodes.load_custom_node(pack))
    return nodes.NODE_CLASS_MAPPINGS["APTVAEDecode"], nodes.NODE_CLASS_MAPPINGS["APTVAEDecodeToVideo"]


def load_vae(path: str) -> comfy.sd.VAE:
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    return comfy.sd.VAE(sd=state, metadata=metadata)


def load_small_vae_22(path: str, dim: int, decoder_dim: int) -> comfy.sd.VAE:
    """ComfyUI builds the Wan 2.2 VAE in its released size only; the class itself takes any."""
    released = vae2_2.WanVAE
    vae2_2.WanVAE = lambda **config: released(**config | {"dim": dim, "dec_dim": decoder_dim})
    try:
        return load_vae(path)
    finally:
        vae2_2.WanVAE = released


def random_tiny_autoencoder() -> comfy.sd.VAE:
    """A video VAE with Wan 2.1's latents that is not Wan's: the tiny autoencoder for previews."""
    state = TAEHV(latent_channels=16, latent_format=None).state_dict()
    return comfy.sd.VAE(sd={key: 0.05 * torch.randn(value.shape) for key, value in state.items()})


def stock(vae, latent: torch.Tensor) -> torch.Tensor:
    return nodes.VAEDecode().decode(vae, {"samples": latent})[0]


class Progress:
    """Stands in for the server: keeps what nodes report, and may cancel after so many reports."""

    def __init__(self, cancel_after: int | None = None):
        self.values, self.totals, self.previews, self.cancel_after = [], set(), [], cancel_after
        comfy.utils.set_progress_bar_global_hook(self)

    def __call__(self, value, total, preview, node_id=None):
        self.values.append(value)
        self.totals.add(total)
        self.previews.append(preview)
        if len(self.values) == self.cancel_after:
            comfy.model_management.interrupt_current_processing()


class Calls:
    """Counts the calls of a module, and may fail as a device without memory does."""

    def __init__(self, module, fails=lambda call, x: False):
        self.count = 0

        def before(_, inputs):
            self.count += 1
            if fails(self.count, inputs[0]):
                raise torch.OutOfMemoryError("out of memory")

        self.hook = module.register_forward_pre_hook(before)
