"""Decode with Wan's video VAEs slice by slice. It uses ComfyUI's own modules, so the numbers are those of
stock VAEDecode.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import TypeVar

import torch
from comfy import model_management
from comfy.ldm.wan import vae as wan21
from comfy.ldm.wan import vae2_2 as wan22
from comfy.sd import VAE
from comfy.utils import ProgressBar
from latent_preview import MAX_PREVIEW_RESOLUTION, preview_to_image
from torch import Tensor

from ..apt_core.errors import AptError

Result = TypeVar("Result")


def read_latent(node: str, vae: VAE, samples: dict) -> Tensor:
    """The tensor of a LATENT; of a nested one (video with sound) the first, as in stock VAEDecode.

    Raises AptError, which begins with the node's display name, for latents that do not belong to this VAE.
    """
    latent = samples["samples"]
    if latent.is_nested:
        latent = latent.unbind()[0]
    if type(vae) is VAE and (vae.output_channels == 2 or vae.latent_dim == 1):
        kind = type(vae.first_stage_model).__name__
        raise AptError(
            f"{node}: this VAE ({kind}) makes sound or solids, not images: "
            "load the VAE that belongs to the video model."
        )
    images_only = type(vae) is VAE and vae.latent_dim == 2 and latent.ndim == 5
    if (images_only or _slicer(vae)) and (latent.ndim, latent.shape[1]) != (5, vae.latent_channels):
        takes = (
            f"{vae.latent_channels} channels"
            if images_only
            else f"[batch, {vae.latent_channels}, frames, height, width]"
        )
        raise AptError(
            f"{node}: the latent is {list(latent.shape)}, but this VAE takes {takes}: "
            "load the VAE that belongs to the model, Wan 2.1's for 16 channels and Wan 2.2's for 48."
        )
    return latent


def decode(vae: VAE, latent: Tensor, consume: Callable[[Iterable[Tensor], int], Result]) -> Result:
    """Call `consume(pieces, total)` with the decoded frames. pieces: `[n, height, width, channels]` in [0,
    1], clip after clip; total: the number of all frames.

    A Wan VAE decodes one slice of its latents into each piece and keeps none. Any other VAE, and one that
    runs out of memory, decodes in one piece like stock; in the second case `consume` is called again.
    """
    slicer = _slicer(vae)
    if slicer:
        total = len(latent) * vae.upscale_ratio[0](latent.shape[2])
        try:
            return consume(_stream(vae, latent, slicer, total), total)
        except Exception as error:
            model_management.raise_non_oom(error)
            logging.warning(
                "Ran out of memory in a slice of the VAE decode, going on as stock VAEDecode does."
            )
    # Outside of the except block, where the exception would keep the failed slice's memory alive.
    images = vae.decode(latent)
    images = images.reshape(-1, *images.shape[-3:])
    return consume([images], len(images))


def _stream(vae: VAE, latent: Tensor, slicer: Callable, total: int) -> Iterator[Tensor]:
    progress = ProgressBar(total)
    vae.prepare_decode(latent.shape)
    with model_management.cuda_device_context(vae.device):
        for clip in latent.split(1):
            for pixels in slicer(vae.first_stage_model, clip.to(vae.device, vae.vae_dtype)):
                frames = vae.process_output(pixels.to(vae.vae_output_dtype()))[0].movedim(0, -1)
                preview = preview_to_image(frames[-1, ..., :3], do_scale=False)
                progress.update_absolute(
                    progress.current + len(frames), preview=("JPEG", preview, MAX_PREVIEW_RESOLUTION)
                )
                yield frames
                model_management.throw_exception_if_processing_interrupted()


def _slicer(vae: VAE) -> Callable[[torch.nn.Module, Tensor], Iterator[Tensor]] | None:
    """The function that decodes this VAE's latents in slices. None when its decoder, which is private to
    ComfyUI, is not of a known form.
    """
    model = vae.first_stage_model if type(vae) is VAE else None
    if type(model) not in (wan21.WanVAE, wan22.WanVAE):
        return None
    takes = tuple(signature(model.decoder.forward).parameters)
    if type(model) is wan22.WanVAE:
        return _slices_of_22 if takes == ("x", "feat_cache", "feat_idx", "first_chunk") else None
    # A decoder without run_up returns a tensor and not chunks; stock then cuts other slices.
    return (
        _slices_of_21
        if takes == ("x", "feat_cache", "feat_idx") and hasattr(model.decoder, "run_up")
        else None
    )


def _slices_of_21(model: wan21.WanVAE, z: Tensor) -> Iterator[Tensor]:
    """Latents [1, 16, f, h, w] -> pixels [1, 3, n, 8h, 8w] of 1, 2, 2, ... latent frames. These are stock's
    slices, so the result is the same bit for bit.
    """
    x = model.conv2(z)
    cache = _empty_cache(model.decoder) if x.shape[2] > 1 else None
    for start in (0, *range(1, x.shape[2], 2)):
        part = x[:, :, start : start + 2 if start else 1]
        yield torch.cat(model.decoder(part, feat_cache=cache, feat_idx=[0]), 2)


def _slices_of_22(model: wan22.WanVAE, z: Tensor) -> Iterator[Tensor]:
    """Latents [1, 48, f, h, w] -> pixels [1, 3, n, 16h, 16w] of one latent frame each."""
    x = model.conv2(z)
    cache = _empty_cache(model.decoder)
    for i in range(x.shape[2]):
        part = model.decoder(x[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
        yield wan22.unpatchify(part, patch_size=2)


def _empty_cache(decoder: torch.nn.Module) -> list[None]:
    """An empty entry for the last frames of each causal convolution."""
    return [None] * sum(isinstance(module, wan21.CausalConv3d) for module in decoder.modules())
