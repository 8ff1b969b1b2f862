"""APT VAE Decode: latents to images, streamed in time."""

from collections.abc import Iterable

import torch
from comfy import model_management
from comfy_api.latest import io

from . import streaming

NAME = "APT VAE Decode"


class APTVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTVAEDecode",
            display_name=NAME,
            category="APT",
            description=(
                "Decodes video latents to exactly the images of VAE Decode, a few frames at a time: "
                "with progress, a preview of the last frame, a cancel that acts at once, "
                "and only the images themselves growing with the length of the clip."
            ),
            search_aliases=["decode", "vae decode", "wan vae", "latent to image", "streamed decode"],
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip=(
                        "The VAE that belongs to the model. Wan's are streamed, "
                        "any other one is decoded as VAE Decode does."
                    ),
                ),
                io.Latent.Input(
                    "samples", tooltip="The latents to decode. Clips of a batch come one after another."
                ),
            ],
            outputs=[io.Image.Output(tooltip="All frames of all clips, in order.")],
        )

    @classmethod
    def execute(cls, vae, samples) -> io.NodeOutput:
        latent = streaming.read_latent(NAME, vae, samples)
        return io.NodeOutput(streaming.decode(vae, latent, _gather))


def _gather(pieces: Iterable[torch.Tensor], total: int) -> torch.Tensor:
    device, images, done = model_management.intermediate_device(), None, 0
    for frames in pieces:
        if len(frames) == total:
            return frames.to(device)
        if images is None:
            images = torch.empty(total, *frames.shape[1:], dtype=frames.dtype, device=device)
        images[done : done + len(frames)] = frames
        done += len(frames)
    return images
