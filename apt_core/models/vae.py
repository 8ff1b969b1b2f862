"""Wan's video VAE (diffusers' AutoencoderKLWan): load and save it in official keys, encode to normalised
latents and decode them. `latents` has their statistics and sizes.
"""

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
from .latents import LATENTS_MEAN, LATENTS_STD, check_size, denormalize, normalize, stride


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
            f"{path}: its config has a dim_mult that its {len(shapes)} tensors cannot fill: "
            "download it again."
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
            f"a Wan {version} VAE file has fixed latents_mean and latents_std, others are in this config: "
            "use fold_statistics first."
        )
    tensors = {keys.vae_to_official(key, version): value for key, value in vae.state_dict().items()}
    write_tensors(path, tensors, {})


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
            f"it has {z} latent channels, but Wan {version} has {fixed}: "
            "give a diffusers folder, whose config names its statistics."
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
            f"{path}: no Wan VAE can be built from its config ({' '.join(str(error).split())}): "
            "download it again."
        ) from None
