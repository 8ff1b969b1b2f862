"""Train the miniature's video VAE: the official Wan 2.1 architecture with a small base width."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.models.latents import fold_statistics
from apt_core.models.vae import decode, encode, load_vae, save_vae
from trainer.stages.muon import Muon

from .clips import draw

BASE_DIM = 12


def crops(pool: np.ndarray, rng: np.random.Generator, batch: int, size: int, frames: int) -> Tensor:
    """Random space-time crops of drawn clips: `[batch, 3, frames, size, size]` in [-1, 1]."""
    out = []
    for i in rng.integers(len(pool), size=batch):
        t, y, x = (rng.integers(n - m + 1) for n, m in zip(pool.shape[1:4], (frames, size, size)))
        out.append(pool[i, t : t + frames, y : y + size, x : x + size])
    return torch.from_numpy(np.stack(out)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


@dataclass(frozen=True)
class Stage:
    """A part of the training: updates on `batch` random crops of `frames` frames and `size` x `size` pixels.

    lr falls to lr_end.
    """

    updates: int
    batch: int
    size: int
    frames: int
    lr: float
    lr_end: float


RECIPE = (
    Stage(1000, 16, 32, 1, 2e-2, 2e-2),
    Stage(1200, 8, 32, 5, 2e-2, 4e-3),
    Stage(230, 4, 48, 9, 4e-3, 3e-4),
)


def train_vae(
    out: Path,
    *,
    stages: tuple[Stage, ...] = RECIPE,
    kl_weight: float = 1e-4,
    pool_size: int = 3000,
    seed: int = 0,
    amp: bool = False,
    device: str = "cpu",
    report=print,
):
    """Train the VAE and write it to `out` (official keys, fp32).

    The latents' statistics are folded into the weights, so that Wan 2.1's fixed statistics hold.
    """
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    pool, _ = draw(seed + 1000, range(pool_size), moving=True)
    vae = AutoencoderKLWan(base_dim=BASE_DIM).to(device)
    inflate(vae)
    with torch.no_grad():
        # Start with a posterior of standard deviation 0.05: noise of unit size would hide what the network
        # could learn at first.
        vae.quant_conv.weight[vae.config.z_dim :] *= 0.1
        vae.quant_conv.bias[vae.config.z_dim :] = -6.0
    optimizer, update = Muon(vae.parameters()), 0
    for stage in stages:
        for i in range(stage.updates):
            x = crops(pool, rng, stage.batch, stage.size, stage.frames).to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample
            difference = x - y.float()
            kl = (
                0.5
                * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
            )
            l1, l2 = difference.abs().mean(), difference.pow(2).mean()
            (l1 + 3.0 * l2 + kl_weight * kl).backward()
            optimizer.param_groups[0]["lr"] = (
                stage.lr + (stage.lr_end - stage.lr) * i / stage.updates
            ) * min(1.0, (update + 1) / 50)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if update % 50 == 0:
                report(f"vae {update}: l1 {l1:.4f} l2 {l2:.5f} kl {kl:.2f}")
            update += 1

    vae.eval()
    mean, std = latent_statistics(vae, pool[:256], device)
    fold_statistics(vae, mean, std)
    save_vae(out, vae)
    return vae


def sharpen(
    source: Path,
    out: Path,
    *,
    updates: int = 1600,
    images: int = 4096,
    clips: int = 768,
    image_batch: int = 16,
    clip_batch: int = 2,
    lr: float = 2e-3,
    edge_weight: float = 0.5,
    energy_weight: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
    report=print,
):
    """Train only the decoder of `source`, so that it restores sharp edges, and write the VAE to `out`.

    The encoder is unchanged, and so are its latents: a transformer that was trained on them still fits.
    Images and clips take turns. Besides the pixel loss there is the L1 distance of Laplacians, because a
    pixel loss alone gives up edges first, and the squared relative error of each sample's Laplacian energy,
    because otherwise everything uncertain stays soft. A VAE trained from scratch with either would get stuck
    at flat colours.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 4])
    vae = load_vae(source).to(device)
    weights = [
        p.requires_grad_()
        for name, p in vae.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    ]
    pools = {}
    for kind, count, batch in (("image", images, image_batch), ("clip", clips, clip_batch)):
        pixels = draw(seed + 1000, range(count), moving=kind == "clip")[0]
        x = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3)
        with torch.no_grad():
            latents = torch.cat([encode(vae, _unit(part).to(device)).cpu() for part in x.split(32)])
        pools[kind] = x, latents, batch
    optimizer, losses = Muon(weights), {kind: [] for kind in pools}
    for update in range(updates):
        kind = "clip" if update % 2 else "image"
        pixels, latents, batch = pools[kind]
        pick = torch.from_numpy(rng.integers(len(pixels), size=batch))
        x, y = _unit(pixels[pick]).to(device), decode(vae, latents[pick].to(device))
        difference = x - y
        edges, wanted = laplacian(y), laplacian(x)
        energy = (edges.square().mean((1, 2, 3)) / wanted.square().mean((1, 2, 3)) - 1).square().mean()
        pixels_loss = difference.abs().mean() + 3.0 * difference.pow(2).mean()
        loss = pixels_loss + edge_weight * (edges - wanted).abs().mean() + energy_weight * energy
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (update + 1) / 20, 1.5 * (updates - update) / updates)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[kind].append(loss.detach())
        if (update + 1) % 100 == 0:
            means = {
                kind: round(float(torch.stack(values[-50:]).mean()), 4) for kind, values in losses.items()
            }
            report(f"decoder {update + 1}: {means}")
    vae.eval().requires_grad_(False)
    save_vae(out, vae)
    return vae


def _unit(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def laplacian(x: Tensor) -> Tensor:
    """Laplacian of the brightness: `[B, 3, F, H, W]` -> `[B, F, H - 2, W - 2]`."""
    gray = x.mean(1)
    return (
        gray[..., :-2, 1:-1]
        + gray[..., 2:, 1:-1]
        + gray[..., 1:-1, :-2]
        + gray[..., 1:-1, 2:]
        - 4 * gray[..., 1:-1, 1:-1]
    )


@torch.no_grad()
def inflate(vae) -> None:
    """Initialise the video network so that it treats each frame as an image.

    Every kernel looks only at the current frame, and resampling in time repeats or drops frames. The first
    part of the training can then learn all that images teach.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            if name.endswith("time_conv"):
                eye = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.zero_()
                module.weight[:, :, -1, 0, 0] = eye
                module.bias.zero_()
            else:
                module.weight[:, :, :-1] = 0


@torch.no_grad()
def latent_statistics(vae, clips: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the clips' raw posterior means, `[16]` each.

    clips: uint8 `[n, F, H, W, 3]`.
    """
    latents = []
    for chunk in np.array_split(clips, max(1, len(clips) // 16)):
        x = torch.from_numpy(chunk).permute(0, 4, 1, 2, 3).float().to(device) / 127.5 - 1.0
        latents.append(vae.encode(x).latent_dist.mean)
    stacked = torch.cat(latents)
    return stacked.mean(dim=(0, 2, 3, 4)), stacked.std(dim=(0, 2, 3, 4))
