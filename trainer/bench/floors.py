"""Count the least that each part must compute and move, from the true shapes on device "meta"."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.bench.shapes import Shapes
from trainer.machines.counts import counts_of, tokens


@dataclass(frozen=True)
class Work:
    """The least work of one part.

    flops: of matrix products and convolutions; moved: bytes that must be read or written at least once
    (weights, input, output).
    """

    flops: float
    moved: float


def count_work(shapes: Shapes, width: int, text_tokens: int) -> dict[str, Work]:
    """The work of "text", "dit" and "vae", with weights and activations of `width` bytes each."""
    model, (height, pixels_wide, frames) = shapes.preset.model, shapes.size
    t, down, across = model.stride
    latents = torch.empty(
        1, model.channels, (frames - 1) // t + 1, height // down, pixels_wide // across, device="meta"
    )
    encoder, vae = (part("meta", torch.float32) for part in (shapes.text_encoder, shapes.vae))
    transformer = shapes.transformer("meta", torch.float32)
    ids = torch.zeros(1, text_tokens, dtype=torch.long, device="meta")
    with torch.no_grad():
        text_flops = _flops(lambda: encoder(input_ids=ids))
        vae_flops = _flops(lambda: vae.decode(latents))
    # Only the prompt's rows of the embedding are read.
    layers = _bytes(encoder, width) - encoder.shared.weight.numel() * width
    video = 3 * height * pixels_wide * frames
    return {
        "text": Work(text_flops, layers),
        "dit": Work(
            sum(counts_of(model).forward(model, tokens(shapes.preset, "video"))),
            _bytes(transformer, width) + 2 * latents.numel() * width,
        ),
        "vae": Work(vae_flops, _bytes(vae.decoder, width) + latents.numel() * width + video),
    }


def _flops(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _bytes(model: nn.Module, width: int) -> int:
    return sum(p.numel() for p in model.parameters()) * width
