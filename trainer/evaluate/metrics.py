"""Figures of a clip that need no network: uint8 RGB `[F, H, W, 3]` to a number, or None where there is none.

Brightness is BT.709's luma of the pixels as they are stored (gamma-coded), in levels of 0 to 255. A clip is
measured alone, so nothing depends on batches; a model's figure is the mean over its clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trainer.mini.metrics import edge_energy

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
GRID = 8
"""Cells along each side of the coarse picture of flicker, first_frame and diversity."""


def luma(clip: np.ndarray) -> np.ndarray:
    """Brightness `[F, H, W]`, fp32 in 0 to 255."""
    return np.stack([frame.astype(np.float32) @ LUMA for frame in clip])


def coarse(frames: np.ndarray, cells: int = GRID) -> np.ndarray:
    """Means over cells x cells areas of each frame, `[F, H, W, ...]` -> `[F, cells, cells, ...]`; of frames
    with fewer pixels than cells, each pixel is a cell.
    """
    for axis in (1, 2):
        length = frames.shape[axis]
        edges = np.linspace(0, length, min(cells, length) + 1).round().astype(int)
        sums = np.add.reduceat(frames, edges[:-1], axis=axis, dtype=np.float64)
        shape = [1] * frames.ndim
        shape[axis] = -1
        frames = sums / np.diff(edges).reshape(shape)
    return frames


def sharpness(clip: np.ndarray) -> float:
    """Edge energy: mean squared Laplacian of the brightness. A blur takes it away first; noise adds to it."""
    return edge_energy(luma(clip)[None, ..., None])


def flicker(clip: np.ndarray) -> float | None:
    """How far a frame is from the mean of the two beside it: mean over time and the cells of an 8 x 8 grid
    of |b[t] - (b[t-1] + b[t+1]) / 2|, in levels of brightness. 0 for what is still or changes evenly.
    """
    if len(clip) < 3:
        return None
    b = coarse(luma(clip))
    return float(np.abs(b[1:-1] - (b[:-2] + b[2:]) / 2).mean())


def motion(clip: np.ndarray) -> float | None:
    """Dynamic degree without optical flow: the standard deviation of each pixel's brightness over time (root
    of the mean variance), over that of all the clip's pixels. 0 for a still, 1 where all contrast is in time.

    Free of contrast and of the order of frames; it cannot tell things that move from light that changes.
    """
    if len(clip) < 2:
        return None
    b = luma(clip)
    whole = b.var(dtype=np.float64)
    return float(np.sqrt(b.var(0, dtype=np.float64).mean() / whole)) if whole > 1e-6 else 0.0


def first_frame(clip: np.ndarray) -> float | None:
    """First-frame consistency: correlation of each later frame's brightness with the first one's, on an 8 x
    8 grid, mean over frames. 1 for a still; None where the first frame is flat.
    """
    if len(clip) < 2:
        return None
    b = coarse(luma(clip)).reshape(len(clip), -1)
    b = b - b.mean(1, keepdims=True)
    norms = np.linalg.norm(b, axis=1)
    if norms[0] < 1e-6:
        return None
    return float(np.mean(b[1:] @ b[0] / (norms[0] * norms[1:].clip(min=1e-6))))


def saturation(clip: np.ndarray) -> float:
    """Mean chroma: the largest of red, green and blue less the smallest, over 255. 0 is grey."""
    return float(np.mean([(frame.max(-1) - frame.min(-1)).mean() for frame in clip]) / 255)


def contrast(clip: np.ndarray) -> float:
    """RMS contrast: the standard deviation of a frame's brightness in levels, mean over frames."""
    return float(np.mean([frame.std(dtype=np.float64) for frame in luma(clip)]))


def thumbnail(clip: np.ndarray) -> np.ndarray:
    """What diversity compares: RGB on an 8 x 8 grid, `[F, 8, 8, 3]` fp32."""
    return coarse(clip).astype(np.float32)


def diversity(thumbnails: Sequence[Sequence[np.ndarray]]) -> float | None:
    """Of each prompt's samples (`thumbnail` of each): RMS distance of two of them in levels, mean over all
    pairs of one prompt, then over prompts. 0 where the seed changes nothing; None for one sample a prompt.
    """
    prompts = []
    for group in thumbnails:
        pairs = [np.sqrt(np.mean((a - b) ** 2, dtype=np.float64)) for a, b in combinations(group, 2)]
        if pairs:
            prompts.append(np.mean(pairs))
    return float(np.mean(prompts)) if prompts else None


@dataclass(frozen=True)
class Metric:
    """of: the function of a clip; title and words: what the page says of it."""

    title: str
    words: str
    of: Callable[[np.ndarray], float | None] | None = None


CLIP: Mapping[str, Metric] = {
    "sharpness": Metric("Sharpness", "edge energy: mean squared Laplacian of the brightness", sharpness),
    "flicker": Metric("Flicker", "levels by which a frame is off the mean of its neighbours", flicker),
    "motion": Metric("Motion", "brightness's spread over time, as a share of all of it", motion),
    "first_frame": Metric("First frame", "correlation of later frames with the first", first_frame),
    "saturation": Metric("Saturation", "mean chroma, 0 to 1", saturation),
    "contrast": Metric("Contrast", "spread of a frame's brightness, in levels", contrast),
}
"""By name, those of a single clip."""
DIVERSITY = "diversity"
FD = "fd"
WORDS: Mapping[str, Metric] = {
    **CLIP,
    DIVERSITY: Metric("Seed diversity", "RMS distance of two samples of one prompt, in levels"),
}
NAMES = (*WORDS, FD)
