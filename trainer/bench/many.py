"""A model, and no measurement: what the parts would take on several GPUs that share one clip."""

from trainer.bench.shapes import Shapes
from trainer.machines.account import tokens

NVLINK = 450e9  # bytes/s of each direction of a Hopper card, all its links together
EXCHANGE = 30e-6  # seconds that a collective or a halo takes before its first byte arrives
GPUS = (1, 2, 4, 8)


def model_of_many(shapes: Shapes, seconds: dict[str, float]) -> dict[int, dict[str, float]]:
    """Seconds by part for each number of GPUs that divides the attention heads, from the measured ones on
    one.

    Transformer: compute divides; queries, keys, values and answers of all tokens change places in each block.
    Decode: rows divide; each 3x3 convolution gets two rows of its neighbours, each GPU gets the finished rows
    of all. The text encoder runs on each.
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
    """(bytes that one GPU receives from its neighbours, exchanges) of one decode, latent frame by latent
    frame.
    """
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
