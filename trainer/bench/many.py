"""Estimate, without measuring, how long the parts would take on several GPUs that share one clip."""

from trainer.bench.shapes import Shapes
from trainer.machines.counts import tokens

NVLINK = 450e9  # bytes/s in each direction, over all links of a Hopper card
EXCHANGE = 30e-6  # seconds before the first byte of a collective or halo exchange arrives
GPUS = (1, 2, 4, 8)


def model_of_many(shapes: Shapes, seconds: dict[str, float]) -> dict[int, dict[str, float]]:
    """Estimated seconds by part, for each number of GPUs that divides the attention heads.

    seconds: measured on one GPU. The transformer's compute is divided; in each block, the queries, keys,
    values and outputs of all tokens are exchanged. The decode is divided by rows: each 3x3 convolution gets
    two rows from its neighbours, and each GPU receives all finished rows. Every GPU runs the text encoder.
    """
    model = shapes.preset.model
    n, d = tokens(shapes.preset, "video"), model.width
    halo_bytes, halos = _halos(shapes)
    height, width, frames = shapes.size
    out = {}
    for gpus in (count for count in GPUS if model.heads % count == 0):
        away = (gpus - 1) / gpus
        swapped = (
            model.layers * 4 * n * d * 2 / gpus * away / NVLINK + (gpus > 1) * model.layers * 4 * EXCHANGE
        )
        rows = (gpus > 1) * (
            halo_bytes / NVLINK + halos * EXCHANGE
        ) + 3 * height * width * frames * 2 * away / NVLINK
        parts = {
            "text": seconds["text"],
            "dit": seconds["dit"] / gpus + swapped,
            "vae": seconds["vae"] / gpus + rows,
        }
        out[gpus] = parts | {"total": sum(parts.values())}
    return out


def _halos(shapes: Shapes) -> tuple[float, int]:
    """(bytes that one GPU receives from its neighbours, exchanges) of a decode that goes frame by frame."""
    import torch

    vae, model = shapes.vae("meta", torch.float32), shapes.preset.model
    height, width, frames = shapes.size
    t, down, across = model.stride
    found = [0.0, 0]

    def count(module, inputs, _) -> None:
        if module.kernel_size[-2] > 1:
            x = inputs[0]
            found[0] += 2 * x.numel() / x.shape[-2] * 2
            found[1] += 1

    for module in vae.decoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        vae.decode(
            torch.empty(
                1, model.channels, (frames - 1) // t + 1, height // down, width // across, device="meta"
            )
        )
    return found[0], found[1]
