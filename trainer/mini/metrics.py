"""How good a set of samples is: fidelity, sharpness, structure, alignment and diversity, each against real
clips.
"""

import numpy as np
import torch
from einops import rearrange
from scipy import linalg

from .clips import Scene
from .features import CHANNELS, FeatureNet
from .judge import read_clip

NEIGHBOURS = 5


class Reference:
    """Real clips `uint8 [n, F, H, W, 3]` and what is compared with them. Compare sets of equal size: Frechet
    distances depend on it.
    """

    def __init__(self, net: FeatureNet, pixels: np.ndarray) -> None:
        self.net = net
        whole, patches = features(net, pixels)
        # Features are measured in units of their spread over real clips, so that none counts for its scale
        # alone; a change from frame to frame in the units of the feature that changes (real clips change so
        # little that flicker would be all).
        spread = whole[:, :CHANNELS].std(0) + 1e-6
        self.scale, self.patch_scale = np.tile(spread, whole.shape[1] // CHANNELS), patches.std(0) + 1e-6
        self.whole, self.patches = whole / self.scale, patches / self.patch_scale
        self.edges = edge_energy(pixels)

    def measure(self, pixels: np.ndarray, scenes: list[Scene] | None) -> dict[str, float | None]:
        """The row of one column. None is what cannot be known: structure, alignment and motion without scenes
        (other people's clips), motion of pictures, fd and diversity of a single sample, sharpness against
        flat pictures.
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
    """Features of each sample `[n, d]` and of its patches `[m, 32]`.

    A clip's features are the mean over its frames and, for F > 1, the mean change from frame to frame: d is
    32 or 64.
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
        # The first, middle and last frame hold nearly all that a clip's patches can show.
        grid = grid.reshape(len(part), frames, *grid.shape[1:])[:, sorted({0, frames // 2, frames - 1})]
        patches.append(rearrange(grid, "n f c h w -> (n f h w) c").double().numpy())
    return np.concatenate(whole), np.concatenate(patches)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features `[n, d]`, n > 1."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of sqrt(A B) from the eigenvalues of A B, which are real and not negative up to rounding.
    eigenvalues = linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    distance = (
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    )
    return max(0.0, float(distance))


def edge_energy(pixels: np.ndarray) -> float:
    """Mean squared Laplacian of the brightness: what a blur takes away first."""
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
    """Share of the real clips that have a sample within the distance of their k-th real neighbour (Naeem et
    al., 2020).
    """
    radii = np.sort(_distances(real, real), axis=1)[:, min(k, len(real) - 1)]
    return float((_distances(real, samples).min(axis=1) <= radii).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(squared.clip(min=0))
