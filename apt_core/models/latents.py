"""Latents of Wan's VAEs: their statistics, their sizes, and the change of a VAE that gives it these
statistics.

The transformer sees `(latent - mean) / std` with the fixed statistics of each Wan version. ComfyUI has the
same numbers built in, so the latents of your own VAE must have exactly those statistics (`fold_statistics`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AptError

# Of the released models; ComfyUI's latent formats Wan21 and Wan22 and diffusers' configs hold the same.
LATENTS_MEAN = {
    "2.1": (
        -0.7571,
        -0.7089,
        -0.9113,
        0.1075,
        -0.1745,
        0.9653,
        -0.1517,
        1.5508,
        0.4134,
        -0.0715,
        0.5517,
        -0.3632,
        -0.1922,
        -0.9497,
        0.2503,
        -0.2921,
    ),
    "2.2": (
        -0.2289,
        -0.0052,
        -0.1323,
        -0.2339,
        -0.2799,
        0.0174,
        0.1838,
        0.1557,
        -0.1382,
        0.0542,
        0.2813,
        0.0891,
        0.1570,
        -0.0098,
        0.0375,
        -0.1825,
        -0.2246,
        -0.1207,
        -0.0698,
        0.5109,
        0.2665,
        -0.2108,
        -0.2158,
        0.2502,
        -0.2055,
        -0.0322,
        0.1109,
        0.1567,
        -0.0729,
        0.0899,
        -0.2799,
        -0.1230,
        -0.0313,
        -0.1649,
        0.0117,
        0.0723,
        -0.2839,
        -0.2083,
        -0.0520,
        0.3748,
        0.0152,
        0.1957,
        0.1433,
        -0.2944,
        0.3573,
        -0.0548,
        -0.1681,
        -0.0667,
    ),
}
LATENTS_STD = {
    "2.1": (
        2.8184,
        1.4541,
        2.3275,
        2.6558,
        1.2196,
        1.7708,
        2.6052,
        2.0743,
        3.2687,
        2.1526,
        2.8652,
        1.5579,
        1.6382,
        1.1253,
        2.8251,
        1.9160,
    ),
    "2.2": (
        0.4765,
        1.0364,
        0.4514,
        1.1677,
        0.5313,
        0.4990,
        0.4818,
        0.5013,
        0.8158,
        1.0344,
        0.5894,
        1.0901,
        0.6885,
        0.6165,
        0.8454,
        0.4978,
        0.5759,
        0.3523,
        0.7135,
        0.6804,
        0.5833,
        1.4146,
        0.8986,
        0.5659,
        0.7069,
        0.5338,
        0.4889,
        0.4917,
        0.4069,
        0.4999,
        0.6866,
        0.4093,
        0.5709,
        0.6065,
        0.6415,
        0.4944,
        0.5726,
        1.2042,
        0.5458,
        1.6887,
        0.3971,
        1.0600,
        0.3943,
        0.5537,
        0.5444,
        0.4089,
        0.7468,
        0.7744,
    ),
}


def stride(vae) -> tuple[int, int, int]:
    """Pixels per latent in (frames, height, width): (4, 8, 8) for Wan 2.1, (4, 16, 16) for 2.2."""
    time, space = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    return time, space, space


def normalize(latent: Tensor, vae) -> Tensor:
    """`[B, z, f, h, w]` from the VAE's values to the transformer's: `(latent - mean) / std`."""
    mean, std = _statistics(latent, vae)
    return (latent - mean) / std


def denormalize(latent: Tensor, vae) -> Tensor:
    """The inverse of `normalize`: `latent * std + mean`."""
    mean, std = _statistics(latent, vae)
    return latent * std + mean


def _statistics(latent: Tensor, vae) -> tuple[Tensor, Tensor]:
    mean, std = (
        latent.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def check_size(
    height: int,
    width: int,
    frames: int,
    stride: Sequence[int] = (4, 8, 8),
    patch: Sequence[int] = (1, 2, 2),
    what: str = "a clip",
) -> None:
    """Check that height and width are multiples of VAE stride x patch, and frames one more than a multiple of
    the stride in time.

    stride, patch: in (frames, height, width). Raises AptError, which names the nearest sizes that fit; `what`
    begins the sentence.
    """
    steps, spare = (stride[0] * patch[0], stride[1] * patch[1], stride[2] * patch[2]), (1, 0, 0)
    wrong = []
    for name, value, step, extra in zip(("frames", "height", "width"), (frames, height, width), steps, spare):
        if value >= max(extra, 1) and (value - extra) % step == 0:
            continue
        below = (value - extra) // step * step + extra
        near = [str(size) for size in (below, below + step) if size >= max(extra, 1)] or [str(extra or step)]
        wrong.append(
            f"{name} {value} must be {f'{step} n + {extra}' if extra else f'a multiple of {step}'} "
            f"({' or '.join(near)})"
        )
    if wrong:
        raise AptError(f"{what} of {width}x{height} and {frames} frames does not fit: {', '.join(wrong)}.")


@torch.no_grad()
def fold_statistics(vae, mean: Tensor, std: Tensor) -> None:
    """Change the VAE in place so that its latents have exactly the statistics of its config, without changing
    any reconstruction.

    mean, std: `[z]`, per channel, measured on the posterior means of the VAE as it is now. A latent m becomes
    `a m + b` with `a = config std / std` and `b = config mean - a mean`. quant_conv takes up this map (its
    mean rows are scaled and moved, its log variance rows moved by `2 ln a`, so that samples follow too), and
    post_quant_conv takes up the inverse. Both are 1x1x1, so no padding is disturbed.
    Raises AptError when the statistics do not fit the VAE or a channel is constant.
    """
    z = vae.config.z_dim
    mean, std = mean.double().cpu(), std.double().cpu()
    if mean.shape != (z,) or std.shape != (z,):
        raise AptError(
            f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must have one value for each "
            f"of the VAE's {z} channels."
        )
    dead = [i for i in range(z) if not (torch.isfinite(mean[i]) and torch.isfinite(std[i]) and std[i] > 1e-6)]
    if dead:
        raise AptError(
            f"latent channel {dead[0]} has mean {mean[dead[0]]:g} and std {std[dead[0]]:g}: "
            "train the VAE until every channel is used."
        )
    a = torch.tensor(vae.config.latents_std, dtype=torch.float64) / std
    b = torch.tensor(vae.config.latents_mean, dtype=torch.float64) - a * mean

    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight.double().cpu(), into.bias.double().cpu()
    weight[:z] *= a.view(z, 1, 1, 1, 1)
    bias[:z] = a * bias[:z] + b
    bias[z:] += 2 * a.log()
    into.weight.copy_(weight)
    into.bias.copy_(bias)

    weight = out.weight.double().cpu() / a.view(1, z, 1, 1, 1)
    out.bias.copy_(out.bias.double().cpu() - weight.flatten(1) @ b)
    out.weight.copy_(weight)
