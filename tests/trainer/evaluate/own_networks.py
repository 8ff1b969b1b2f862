"""Networks as a user has them: TorchScript files with a table that names them."""

from pathlib import Path

import torch
from torch import nn

from trainer.digest import file_digest
from trainer.evaluate.features import Features, read_networks

CPU = torch.device("cpu")


class Means(nn.Module):
    """Features of frames `[n, 3, H, W]`: the mean of each channel, and of the left half of the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x[:, :1, :, : x.shape[3] // 2].mean(dim=(2, 3))
        return torch.cat([x.mean(dim=(2, 3)), half], dim=1)


class ClipMeans(nn.Module):
    """Features of clips `[n, 3, F, H, W]`: first and last frame's mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, :, 0].mean(dim=(1, 2, 3)), x[:, :, -1].mean(dim=(1, 2, 3))], dim=1)


def table(folder, module=Means, name="means", **settings) -> Path:
    path = folder / f"{name}.pt"
    torch.jit.save(torch.jit.script(module()), str(path))
    given = {"path": path.name, "sha256": file_digest(path), "patch": 0} | settings
    given = {key: list(v) if isinstance(v, tuple) else repr(v) for key, v in given.items() if v is not None}
    lines = [f"{key} = {value}" for key, value in given.items()]
    (folder / "features.toml").write_text("[[features]]\n" + "\n".join(lines) + "\n")
    return folder / "features.toml"


def network(folder, **settings) -> Features:
    return Features(read_networks(table(folder, **settings))[0], CPU)
