"""Measure stock diffusers (WanPipeline in one step, eager, with its own decode) beside the engine."""

import copy
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from apt_core.engine.decoder import Decoder, psnr
from apt_core.method.generator import one_step
from apt_core.models.latents import denormalize
from trainer.bench.rates import median_seconds, peak_memory
from trainer.bench.shapes import Shapes

PART = 3
"""How many latent frames to decode in fp32 too: the first ones, which do not depend on the others."""


@dataclass(frozen=True)
class StockFigures:
    """The figures of stock diffusers.

    seconds: of "vae" and, for a Wan, of "dit" and "both" (the pipeline's call includes both).
    decode_peak: bytes besides weights, measured as the engine's.
    latents: made from the engine's noise. Diffusers has no pipeline for the MMDiT; there, this project's
    plain backbone makes them.
    engine_psnr, stock_psnr: dB between the decode of PART latent frames, by the engine and by diffusers, and
    diffusers' decode in fp32.
    """

    seconds: dict[str, float]
    decode_peak: int
    latents: Tensor
    engine_psnr: float
    stock_psnr: float


@torch.no_grad()
def measure_stock(
    shapes: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    noise: Tensor,
    latents: Tensor,
    text: Tensor,
) -> StockFigures:
    """Measure stock diffusers. Afterwards nothing is left on the device.

    noise: `[1, C, f, h, w]`, for the transformer; latents: of the same shape, for the decode; text:
    `[1, L, d]`.
    """
    figures = _measure(Stock(shapes, device, dtype), dtype, repeats, noise, latents, text.to(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def _measure(
    stock: "Stock", dtype: torch.dtype, repeats: int, noise: Tensor, latents: Tensor, text: Tensor
) -> StockFigures:
    shapes, device = stock.shapes, stock.device

    def decode() -> Tensor:
        return _bytes(stock.decode(latents).clamp_(-1, 1) / 2 + 0.5)

    seconds = {"vae": median_seconds(decode, device, repeats)}
    with peak_memory(device) as peak:
        decode()
    if stock.pipe:
        made = stock.generate(noise, text, pixels=False)
        seconds["dit"] = median_seconds(lambda: stock.generate(noise, text, pixels=False), device, repeats)
        seconds["both"] = median_seconds(lambda: stock.generate(noise, text, pixels=True), device, repeats)
    else:
        made = one_step(shapes.transformer(device, dtype).eval(), noise, text)
    part = latents[:, :, :PART]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        exact = (
            copy.deepcopy(stock.vae)
            .float()
            .decode(denormalize(part, stock.vae), return_dict=False)[0]
            .clamp(-1, 1)
        )
    own = stock.decode(denormalize(part, stock.vae)).float().clamp(-1, 1)
    engine = Decoder(stock.vae).decode(part).movedim(-1, 1)
    return StockFigures(seconds, peak.bytes, made.float().cpu(), psnr(engine, exact), psnr(own, exact))


class Stock:
    """WanPipeline with random weights. Diffusers has no pipeline for the MMDiT; there it can only decode."""

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
            self.pipe = WanPipeline(
                tokenizer=None,
                text_encoder=None,
                transformer=transformer.eval(),
                vae=self.vae,
                scheduler=scheduler,
            )
            self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def generate(self, noise: Tensor, text: Tensor, pixels: bool) -> Tensor:
        """Call the pipeline. Returns uint8 pixels on the CPU or, without `pixels`, latents.

        noise: `[1, C, f, h, w]`; text: `[1, L, d]`.
        """
        height, width, frames = self.shapes.size
        text = text.to(self.pipe.transformer.dtype)
        made = self.pipe(
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise,
            prompt_embeds=text,
            output_type="pt" if pixels else "latent",
        ).frames
        return _bytes(made) if pixels else made

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode as WanPipeline does: the VAE's own latents, in its dtype, to pixels, in one piece."""
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]


def _bytes(pixels: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to uint8 on the CPU, as the engine returns its frames."""
    return (pixels.float() * 255).round_().to(torch.uint8).cpu()
