"""Measure a set of samples: fidelity, sharpness, structure, alignment and diversity, against real clips."""

import numpy as np
import torch
from einops import rearrange
from scipy import linalg

from .clips import Scene
from .features import CHANNELS, FeatureNet
from .judge import read_clip

NEIGHBOURS = 5


class Reference:
    """Real clips, uint8 `[n, F, H, W, 3]`, against which samples are measured.

    Use as many samples as there are clips here, because Frechet distances depend on the number.
    """

    def __init__(self, net: FeatureNet, pixels: np.ndarray) -> None:
        self.net = net
        whole, patches = features(net, pixels)
        # Divide features by their standard deviation over real clips, so that none dominates by its scale.
        # Divide changes from frame to frame by that of the feature itself: real clips change so little that
        # with the changes' own, flicker would dominate everything.
        spread = whole[:, :CHANNELS].std(0) + 1e-6
        self.scale, self.patch_scale = np.tile(spread, whole.shape[1] // CHANNELS), patches.std(0) + 1e-6
        self.whole, self.patches = whole / self.scale, patches / self.patch_scale
        self.edges = edge_energy(pixels)

    def measure(self, pixels: np.ndarray, scenes: list[Scene] | None) -> dict[str, float | None]:
        """The figures of a set of samples, uint8 `[n, F, H, W, 3]`; None for those that cannot be measured.

        These are structure, alignment and motion without scenes (clips that were not drawn), motion of
        images, fd and diversity of a single sample, and sharpness if the reference is flat.
        """
        several = min(len(pixels), len(self.whole)) > 1
        whole, patches = features(self.net, pixels)
        whole, patches = whole / self.scale, patches / self.patch_scale
        row: dict[str, float | None] = {
            "fd": frechet(self.whole, whole) if several else None,
            "patch_fd": frechet(self.patches, patches),
            "sharpness": edge_energy(pixels) / self.edges if self.edges else None,
            "structure": None,
            "alignment": None,
            "motion": None,
            "diversity": coverage(self.whole, whole) if several else None,
        }
        if scenes is not None:
            readings = [read_clip(clip) for clip in pixels]
            words = [reading.agrees(item) for reading, item in zip(readings, scenes)]
            row["structure"] = float(np.mean([reading.structure for reading in readings]))
            row["alignment"] = float(np.mean([w["all"] for w in words]))
            if pixels.shape[1] > 1:
                row["motion"] = float(np.mean([reading.travel for reading in readings]))
            row |= {
                f"alignment_{key}": float(np.mean([w[key] for w in words]))
                for key in words[0]
                if key != "all"
            }
        return row


@torch.no_grad()
def features(net: FeatureNet, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of the samples `[n, d]` and of their patches `[m, 32]`.

    A sample's features are the mean over its frames (d = 32). For F > 1, the mean change from frame to frame
    is appended (d = 64).
    """
    n, frames = pixels.shape[:2]
    whole, patches = [], []
    for part in np.array_split(pixels, max(1, n * frames // 512)):
        x = torch.from_numpy(part.reshape(-1, *part.shape[2:])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pooled, grid = net(x)
        pooled = pooled.reshape(len(part), frames, -1)
        parts = [pooled.mean(1)]
        if frames > 1:
            parts.append(pooled.diff(dim=1).abs().mean(1))
        whole.append(torch.cat(parts, 1).double().numpy())
        # The first, middle and last frame show nearly everything that the patches of a clip can show.
        grid = grid.reshape(len(part), frames, *grid.shape[1:])[:, sorted({0, frames // 2, frames - 1})]
        patches.append(rearrange(grid, "n f c h w -> (n f h w) c").double().numpy())
    return np.concatenate(whole), np.concatenate(patches)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features `[n, d]`, n > 1."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Trace of sqrt(A B) from the eigenvalues of A B, which are real and at least 0, up to rounding.
    eigenvalues = linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    distance = (
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    )
    return max(0.0, float(distance))


def edge_energy(pixels: np.ndarray) -> float:
    """Mean squared Laplacian of the brightness, which falls first when a picture is blurred."""
    total = 0.0
    for clip in pixels:
        gray = clip.astype(np.float32).mean(-1)
        center = gray[:, 1:-1, 1:-1]
        laplacian = (
            gray[:, :-2, 1:-1] + gray[:, 2:, 1:-1] + gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:] - 4 * center
        )
        total += float((laplacian**2).mean())
    return total / len(pixels)


def coverage(real: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Coverage (Naeem et al., 2020): the share of real clips with a sample nearer than their k-th neighbour.

    Neighbours are other real clips. real, samples: features `[n, d]`.
    """
    radii = np.sort(_distances(real, real), axis=1)[:, min(k, len(real) - 1)]
    return float((_distances(real, samples).min(axis=1) <= radii).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(squared.clip(min=0))
