"""What people have without this engine: diffusers' own WanPipeline in one step, eager, with its own decode."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from trainer.bench.shapes import Shapes


class Stock:
    """WanPipeline with random weights of the shapes. The MMDiT has no pipeline of diffusers: of it only the decode can be compared."""

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        self.shapes, self.device = shapes, device
        self.vae = shapes.vae(device, dtype).eval()
        self.pipe = None
        if shapes.preset.model.kind == "wan":
            backbone = shapes.transformer(device, dtype).eval()
            with torch.device("meta"):
                transformer = WanTransformer3DModel.from_config(backbone.config)
            transformer.load_state_dict(backbone.state_dict(), assign=True)
            transformer.rope = backbone.rope
            scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
            self.pipe = WanPipeline(tokenizer=None, text_encoder=None, transformer=transformer.eval(), vae=self.vae, scheduler=scheduler)
            self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def generate(self, noise: Tensor, text: Tensor, pixels: bool) -> Tensor:
        """The whole call, to pixels or only to latents. noise: `[1, C, f, h, w]`; text: `[1, L, d]`."""
        height, width, frames = self.shapes.size
        text = text.to(self.pipe.transformer.dtype)
        return self.pipe(
            height=height, width=width, num_frames=frames, num_inference_steps=1, guidance_scale=1.0, latents=noise, prompt_embeds=text,
            output_type="pt" if pixels else "latent",
        ).frames  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As WanPipeline decodes: latents as the VAE has them, in its dtype, to pixels in one piece."""
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
