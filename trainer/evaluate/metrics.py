"""Metrics of a clip that need no network. Each takes uint8 RGB `[F, H, W, 3]` and returns a number, or None
where it is not defined.

Brightness means BT.709 luma of the stored (gamma-coded) pixels, in levels 0 to 255. Each clip is measured on
its own, so no result depends on how clips are batched. A model's figure is the mean over its clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations

import numpy as np

from trainer.mini.clips import SIZE, is_drawn, words_of
from trainer.mini.judge import read_clip
from trainer.mini.metrics import edge_energy

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
GRID = 8
"""Cells along each side of the coarse grid that flicker, first_frame and diversity use."""


def luma(clip: np.ndarray) -> np.ndarray:
    """Brightness of a clip: fp32 `[F, H, W]`, 0 to 255."""
    return np.stack([frame.astype(np.float32) @ LUMA for frame in clip])


def coarse(frames: np.ndarray, cells: int = GRID) -> np.ndarray:
    """The mean of each cell of a cells x cells grid: `[F, H, W, ...]` -> `[F, cells, cells, ...]`. A side
    with fewer pixels than cells gets one cell per pixel.
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
    """Edge energy: mean squared Laplacian of the brightness. Blur lowers it first of all; noise raises it."""
    return edge_energy(luma(clip)[None, ..., None])


def flicker(clip: np.ndarray) -> float | None:
    """How much a frame differs from the mean of its two neighbours: |b[t] - (b[t-1] + b[t+1]) / 2|, with b
    the brightness on an 8 x 8 grid, averaged over time and cells; in levels of brightness. It is 0 for a clip
    that is still or changes at a constant rate, and None for fewer than three frames.
    """
    if len(clip) < 3:
        return None
    b = coarse(luma(clip))
    return float(np.abs(b[1:-1] - (b[:-2] + b[2:]) / 2).mean())


def motion(clip: np.ndarray) -> float | None:
    """Dynamic degree without optical flow: the standard deviation of a pixel's brightness over time (root of
    the variance's mean over pixels), divided by the standard deviation over the whole clip. It is 0 for a
    still and 1 if all contrast is over time; None for a single frame.

    It does not depend on contrast or on the order of the frames. It cannot tell moving things from changing
    light.
    """
    if len(clip) < 2:
        return None
    b = luma(clip)
    whole = b.var(dtype=np.float64)
    return float(np.sqrt(b.var(0, dtype=np.float64).mean() / whole)) if whole > 1e-6 else 0.0


def first_frame(clip: np.ndarray) -> float | None:
    """First-frame consistency: the correlation of each later frame with the first one, in brightness on an
    8 x 8 grid, averaged over frames. It is 1 for a still; None for a single frame or if the first is uniform.
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
    """Mean chroma: for each pixel the largest of red, green and blue minus the smallest, divided by 255. Grey
    has 0.
    """
    return float(np.mean([(frame.max(-1) - frame.min(-1)).mean() for frame in clip]) / 255)


def contrast(clip: np.ndarray) -> float:
    """RMS contrast: the standard deviation of brightness within a frame, in levels, averaged over frames."""
    return float(np.mean([frame.std(dtype=np.float64) for frame in luma(clip)]))


def flow(clip: np.ndarray) -> float | None:
    """Dynamic degree by optical flow: the mean length of OpenCV's DIS flow of the brightness between
    successive frames, in percent of the shorter side per frame. 0 for a still. None for a picture, and for
    sides below 16 pixels, on which DIS has no patches.

    Unlike `motion` it does not count light that changes evenly.
    """
    import cv2

    if len(clip) < 2 or min(clip.shape[1:3]) < 16:
        return None
    b = luma(clip).round().astype(np.uint8)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths = [np.linalg.norm(dis.calc(one, two, None), axis=-1).mean() for one, two in zip(b, b[1:])]
    return float(100 * np.mean(lengths) / min(clip.shape[1:3]))


def thumbnail(clip: np.ndarray) -> np.ndarray:
    """RGB on an 8 x 8 grid, fp32 `[F, 8, 8, 3]`: what `diversity` compares."""
    return coarse(clip).astype(np.float32)


def diversity(thumbnails: Sequence[Sequence[np.ndarray]]) -> float | None:
    """How much samples of one prompt differ: the RMS distance between two of them, in levels, averaged over
    all pairs of a prompt and then over prompts. It is 0 if the seed changes nothing, and None with only one
    sample per prompt.

    thumbnails: for each prompt the `thumbnail` of each of its samples.
    """
    prompts = []
    for group in thumbnails:
        pairs = [np.sqrt(np.mean((a - b) ** 2, dtype=np.float64)) for a, b in combinations(group, 2)]
        if pairs:
            prompts.append(np.mean(pairs))
    return float(np.mean(prompts)) if prompts else None


def judged(clip: np.ndarray, caption: str | None) -> dict[str, float | None]:
    """What the miniature's judge reads from a clip, 1 or 0: whether its structure is intact, and whether it
    shows every word of its caption; None without a caption of a drawn clip. Of pictures the direction is not
    asked.
    """
    if (words := words_of(caption or "")) is None:
        return dict.fromkeys(JUDGED)
    reading = read_clip(clip)
    if len(clip) == 1:
        words["direction"] = None
    return {STRUCTURE: float(reading.structure), ALIGNMENT: float(reading.says(words)["all"])}


def can_be_judged(captions: Sequence[str], height: int, width: int) -> bool:
    """Whether the miniature's judge can read clips of these captions: all are its own, and of its size."""
    return (height, width) == (SIZE, SIZE) and all(map(is_drawn, captions))


@dataclass(frozen=True)
class Metric:
    """title, words: how the page names and explains it; of: the function of a clip that computes it."""

    title: str
    words: str
    of: Callable[[np.ndarray], float | None] | None = None


CLIP: dict[str, Metric] = {
    "sharpness": Metric("Sharpness", "edge energy: mean squared Laplacian of the brightness", sharpness),
    "flicker": Metric("Flicker", "how far a frame is from the mean of its neighbours, in levels", flicker),
    "motion": Metric("Motion", "how much brightness varies over time, relative to the whole clip", motion),
    "first_frame": Metric("First frame", "correlation of later frames with the first", first_frame),
    "saturation": Metric("Saturation", "mean chroma, 0 to 1", saturation),
    "contrast": Metric("Contrast", "how much brightness varies within a frame, in levels", contrast),
}
"""The metrics of a single clip, by name."""
FLOW = "flow"
if find_spec("cv2"):
    CLIP[FLOW] = Metric("Flow", "length of optical flow, in percent of the shorter side per frame", flow)
DIVERSITY = "diversity"
CLIP_SCORE = "clip_score"
STRUCTURE, ALIGNMENT = "structure", "alignment"
JUDGED: Mapping[str, Metric] = {
    STRUCTURE: Metric("Structure", "share of clips that show one whole object, by the miniature's judge"),
    ALIGNMENT: Metric("Alignment", "share of clips that show every word, by the miniature's judge"),
}
"""What the miniature's judge says of clips of its own kind."""
FD = "fd"
FID, PFID, FVD = "fid", "pfid", "fvd"
FRECHET_LITE0 = "frechet_efficientnet_lite0"
DISTANCES: Mapping[str, Metric] = {
    FID: Metric("FID", "Frechet distance to the real frames in features of the 2015 Inception"),
    PFID: Metric("PFID", "the same on centre crops of 299 pixels, not resized"),
    FVD: Metric("FVD", "Frechet distance to the real clips in features of the Kinetics I3D"),
    FRECHET_LITE0: Metric(
        "EfficientNet-Lite0", "Frechet distance to the real frames in its features; no FID"
    ),
}
"""The distances whose files of weights are known by their hash."""
WORDS: Mapping[str, Metric] = {
    **CLIP,
    DIVERSITY: Metric("Seed diversity", "RMS distance between two samples of one prompt, in levels"),
    CLIP_SCORE: Metric("CLIP score", "100 max(cos, 0) of frame and prompt by a CLIP model, mean over frames"),
    **JUDGED,
    **DISTANCES,
}
EACH = (*CLIP, CLIP_SCORE, *JUDGED)
"""The metrics that every clip has of its own."""
NAMES = (*EACH, DIVERSITY, FD, *DISTANCES)
"""What `--metrics` takes; `fd` stands for all distances in the networks of `--features`."""
