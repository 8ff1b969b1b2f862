"""Wan's video VAE (diffusers' AutoencoderKLWan): load and save it in official keys, encode to normalised
latents and decode them.

The transformer sees `(latent - mean) / std` with the fixed statistics of each Wan version. ComfyUI has the
same numbers built in, so the latents of your own VAE must have exactly those statistics (`fold_statistics`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError
from ..files import keys
from ..files.folders import pickle_hint, refuse_shard, weight_files
from ..files.jsonfile import read_object
from ..files.quantised import plain_header, restore
from ..files.tensorfile import (
    check_count,
    check_floats,
    check_shapes,
    read_header,
    read_tensors,
    write_tensors,
)

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


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32):
    """Load an AutoencoderKLWan in eval mode, with frozen weights, on the CPU.

    path: one safetensors file in official keys (Wan 2.1 of any base width, which decoder.head.0.gamma tells,
    or 2.2) or in diffusers' keys, with or without one of the prefixes in `keys.VAE_PREFIXES`; or a diffusers
    folder (config.json and diffusion_pytorch_model.safetensors, also sharded or of a variant, in the folder
    itself or in its subfolder vae).
    Raises AptError for a file that is not a whole Wan VAE: see `tensorfile.read_tensors`; missing, extra or
    wrongly shaped keys.
    """
    files, vae, rename = _checked_meta_vae(Path(path))
    tensors = {}
    for file in files:
        tensors |= read_tensors(file, floats_only=False)[0]
    state = {key: restore(tensors, rename(key)).to(dtype, copy=True) for key in vae.state_dict()}
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)


def read_vae(path: str | Path):
    """The AutoencoderKLWan of a file or folder on device "meta", with its config and shapes; reads no weight.
    Raises AptError as `load_vae`.
    """
    return _checked_meta_vae(Path(path))[1]


def _checked_meta_vae(path: Path):
    """(the weight files, the VAE on "meta", a function from diffusers' key to the file's key)."""
    config, files, found = None, [path], {}
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config, files = _folder_config(folder), weight_files(folder)
        path = files[0]
    else:
        refuse_shard(path)
    headers = [plain_header(file, read_header(file)) for file in files]
    for header in headers:
        found |= header.shapes
    prefix = keys.vae_prefix(found)
    shapes = {key.removeprefix(prefix): shape for key, shape in found.items()}
    try:
        layout, version = keys.detect_vae_layout(shapes)
        config = config or _config_from_shapes(shapes, layout, version)
    except AptError as error:
        raise AptError(f"{path}: {error}") from None
    for file, header in zip(files, headers):
        check_floats(file, header)
    depth = config.get("dim_mult", ())
    check_count(path, "num_res_blocks", config.get("num_res_blocks", 1), shapes)
    if not isinstance(depth, list | tuple) or len(depth) > len(shapes):
        raise AptError(
            f"{path}: its config has a dim_mult that its {len(shapes)} tensors cannot fill: download it again."
        )
    vae = _meta_vae(path, config)

    def rename(key: str) -> str:
        return prefix + (keys.vae_to_official(key, version) if layout == "official" else key)

    expected = {rename(key): value.shape for key, value in vae.state_dict().items()}
    check_shapes(path, found, expected, f"Wan {version} VAE")
    return files, vae, rename


def save_vae(path: str | Path, vae) -> None:
    """Write the VAE in official keys and its own dtype, for ComfyUI's Load VAE (Wan 2.1 in any width; 2.2
    only in the released width).

    Raises AptError when the config's latents_mean and latents_std are not the fixed ones, since the file
    cannot hold others, for weights that are not finite, and when the file cannot be written; a file that was
    at `path` then stays.
    """
    version = "2.2" if vae.config.is_residual else "2.1"
    fixed = LATENTS_MEAN[version], LATENTS_STD[version]
    if (tuple(vae.config.latents_mean), tuple(vae.config.latents_std)) != fixed:
        raise AptError(
            f"a Wan {version} VAE file has fixed latents_mean and latents_std, others are in this config: use fold_statistics first."
        )
    tensors = {keys.vae_to_official(key, version): value for key, value in vae.state_dict().items()}
    write_tensors(path, tensors, {})


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


def encode(vae, pixels: Tensor) -> Tensor:
    """Pixels `[B, 3, F, H, W]` in [-1, 1] -> normalised posterior means `[B, z, (F-1)/4+1, H/s, W/s]`, fp32.
    It takes the mean and draws no sample.

    Raises AptError for a size that the VAE cannot take (`check_size` with patch 1).
    """
    frames, height, width = pixels.shape[2:]
    check_size(height, width, frames, stride(vae), patch=(1, 1, 1))
    latent = vae.encode(pixels.to(vae.dtype)).latent_dist.mean
    return normalize(latent.float(), vae)


def decode(vae, latents: Tensor) -> Tensor:
    """Normalised latents `[B, z, f, h, w]` -> pixels `[B, 3, 4(f-1)+1, s h, s w]` in [-1, 1], fp32."""
    return vae.decode(denormalize(latents.float(), vae).to(vae.dtype)).sample.float()


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
            f"{name} {value} must be {f'{step} n + {extra}' if extra else f'a multiple of {step}'} ({' or '.join(near)})"
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
            f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must have one value for each of the VAE's {z} channels."
        )
    dead = [i for i in range(z) if not (torch.isfinite(mean[i]) and torch.isfinite(std[i]) and std[i] > 1e-6)]
    if dead:
        raise AptError(
            f"latent channel {dead[0]} has mean {mean[dead[0]]:g} and std {std[dead[0]]:g}: train the VAE until every channel is used."
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


def _config_from_shapes(shapes: dict, layout: str, version: str) -> dict:
    def shape(official: str) -> tuple[int, ...]:
        key = official if layout == "official" else keys.vae_to_diffusers(official, version)
        if not shapes.get(key):
            raise AptError(f"{key} missing: the file is not a whole Wan {version} VAE, download it again.")
        return shapes[key]

    base, decoder_base = shape("encoder.conv1.bias")[0], shape("decoder.head.0.gamma")[0]
    z, fixed = shape("conv2.bias")[0], len(LATENTS_MEAN[version])
    if z != fixed:
        raise AptError(
            f"it has {z} latent channels, but Wan {version} has {fixed}: give a diffusers folder, whose config names its statistics."
        )
    config = {
        "base_dim": base,
        "latents_mean": list(LATENTS_MEAN[version]),
        "latents_std": list(LATENTS_STD[version]),
    }
    if decoder_base != base:
        config["decoder_base_dim"] = decoder_base
    if version == "2.1":
        # 2.1 has no patches, so these are image channels (4 for an alpha variant).
        return config | {
            "in_channels": shape("encoder.conv1.weight")[1],
            "out_channels": shape("decoder.head.2.bias")[0],
        }
    return config | {
        "z_dim": z,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    }


def _folder_config(folder: Path) -> dict:
    try:
        config = read_object(folder / "config.json", "")
        if config["_class_name"] == "AutoencoderKLWan":
            return config
    except (OSError, ValueError, TypeError, KeyError):
        pass
    what = f"has no config.json of an AutoencoderKLWan{pickle_hint(folder)}"
    raise AptError(f"{folder} {what}: give a diffusers folder of a Wan VAE, or its .safetensors file.")


def _meta_vae(path, config: dict) -> Any:
    """An AutoencoderKLWan. Any, because diffusers types its config as a dict and `from_config` as a tuple."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    try:
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(config)
    except Exception as error:  # whatever a foreign config breaks
        raise AptError(
            f"{path}: no Wan VAE can be built from its config ({' '.join(str(error).split())}): download it again."
        ) from None
