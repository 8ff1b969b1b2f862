"""A small classifier. The miniature's Frechet distances use its features, as FID uses Inception's."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt_core.files.tensorfile import read_tensors, write_tensors
from trainer.stages.muon import Muon

from .clips import COLOR_NAMES, SHAPES, draw

CHANNELS = 32


class FeatureNet(nn.Module):
    """Four convolutions, three of them strided.

    `forward` returns pooled features `[n, 32]` and patch features `[n, 32, 6, 6]`.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, CHANNELS)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 5, stride=2 if b != CHANNELS or a == 16 else 1, padding=2)
            for a, b in zip(widths, widths[1:])
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, c) for c in widths[1:])
        targets = {
            "color": len(COLOR_NAMES),
            "background": len(COLOR_NAMES),
            "shape": len(SHAPES),
            "angle": 4,
            "period": 1,
            "damage": 2,
        }
        self.heads = nn.ModuleDict({name: nn.Linear(CHANNELS, n) for name, n in targets.items()})

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: `[n, 3, H, W]` in [-1, 1]."""
        x = pixels
        for conv, norm in zip(self.layers, self.norms):
            x = F.silu(norm(conv(x)))
        return x.mean(dim=(2, 3)), x


def train_features(
    out: Path, *, updates: int = 1500, batch: int = 64, lr: float = 2e-2, seed: int = 0, report=print
) -> None:
    """Train the classifier on drawn images and write it to `out`.

    It learns what the caption names, the stripes, and how much blur and noise was added, so that its features
    also reflect image quality.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    net = FeatureNet()
    optimizer = Muon(net.parameters())
    for update in range(updates):
        pixels, scenes = draw(seed + 2000, range(update * batch, (update + 1) * batch), moving=False)
        x = torch.from_numpy(pixels[:, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        blur, noise = (
            torch.from_numpy(rng.uniform(0, 1, size=batch) * (rng.random(batch) < 0.5)).float()
            for _ in range(2)
        )
        weight = blur[:, None, None, None]
        x = (1 - weight) * x + weight * F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
        x = x + 0.3 * noise[:, None, None, None] * torch.randn_like(x)
        features, _ = net(x)
        out_of = {name: head(features) for name, head in net.heads.items()}
        losses = {
            "color": F.cross_entropy(
                out_of["color"], torch.tensor([COLOR_NAMES.index(s.color) for s in scenes])
            ),
            "background": F.cross_entropy(
                out_of["background"], torch.tensor([COLOR_NAMES.index(s.background) for s in scenes])
            ),
            "shape": F.cross_entropy(out_of["shape"], torch.tensor([SHAPES.index(s.shape) for s in scenes])),
            "angle": F.cross_entropy(out_of["angle"], torch.tensor([s.stripe_angle for s in scenes])),
            "period": F.mse_loss(
                out_of["period"][:, 0],
                torch.tensor([(s.stripe_period - 9.5) / 2.5 for s in scenes], dtype=torch.float32),
            ),
            "damage": F.mse_loss(out_of["damage"], torch.stack([blur, noise], 1)),
        }
        loss = sum(losses.values())
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (update + 1) / 50, (updates - update) / updates * 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if update % 100 == 0 or update == updates - 1:
            report(
                f"features {update}: "
                + " ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            )
    write_tensors(out, net.state_dict(), {})


def load_features(path: Path) -> FeatureNet:
    net = FeatureNet()
    net.load_state_dict(read_tensors(path)[0])
    return net.eval().requires_grad_(False)
