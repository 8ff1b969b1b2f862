"""Read from its pixels what a sample shows: colour, shape, background, direction, and whether it is intact.

Nothing here is learned. A pixel gets the palette colour with the nearest hue angle, the object is the largest
region that is not background, and its shape is the ideal shape of equal area that overlaps it best.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from .clips import COLOR_NAMES, COLORS, DIRECTIONS, SHAPES, Scene, shape_distance

MIN_OVERLAP = (
    0.84  # intersection over union with the ideal shape; a circle against a square of equal area has 0.83
)
MIN_IN_ONE_PIECE = 0.90  # share of the object's pixels in its largest piece
MAX_STRAY = 0.03  # share of the frame in a third colour, away from the object's edge
AREA_RANGE = (140.0, 450.0)  # pixels; drawn objects have 201 to 314
MAX_AREA_RATIO = 1.6  # largest to smallest frame of a clip
MAX_STEP = 9.0  # pixels between two frames; drawn objects move 1.6 to 2.4
MIN_TRAVEL = 6.0  # pixels from first to last frame; less does not count as moving

_PALETTE = np.array([COLORS[name] for name in COLOR_NAMES], np.float32)
_PALETTE /= np.linalg.norm(_PALETTE, axis=1, keepdims=True)


@dataclass(frozen=True)
class Frame:
    """What one frame shows.

    color, background: positions in the palette; overlaps: intersection over union with each ideal shape;
    area: in pixels; center: (x, y) in pixels; clean: one object in one piece, with a plausible size, and no
    third colour.
    """

    color: int
    background: int
    overlaps: np.ndarray
    area: float
    center: tuple[float, float]
    clean: bool


@dataclass(frozen=True)
class Reading:
    """What a clip shows, by the majority of its frames.

    It also has the direction, how many pixels the object travels from the first frame to the last, and
    whether the clip's structure is intact.
    """

    color: str
    shape: str
    background: str
    direction: str | None
    structure: bool
    travel: float

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """For each word of the caption, whether the sample shows it; `all` needs every word.

        The direction counts only for clips.
        """
        return self.says({key: getattr(scene, key) for key in ("color", "shape", "background", "direction")})

    def says(self, named: Mapping[str, str | None]) -> dict[str, bool]:
        """The same for words by their names; a direction of None is not asked for."""
        words = {key: getattr(self, key) == word for key, word in named.items() if word is not None}
        return {**words, "all": all(words.values())}


def read_frame(pixels: np.ndarray) -> Frame:
    """Read one uint8 `[H, W, 3]` frame."""
    rgb = pixels.astype(np.float32) / 255.0
    cosine = rgb @ _PALETTE.T / (np.linalg.norm(rgb, axis=-1, keepdims=True) + 1e-6)
    nearest = cosine.argmax(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(COLOR_NAMES))
    background = int(counts.argmax())
    counts[background] = 0
    color = int(counts.argmax())

    mask = cosine[..., color] > cosine[..., background]
    labels, pieces = ndimage.label(mask)
    if pieces == 0:
        return Frame(color, background, np.zeros(len(SHAPES)), 0.0, (0.0, 0.0), False)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == sizes.argmax()
    area = float(body.sum())
    ys, xs = np.nonzero(body)
    cx, cy = xs.mean() + 0.5, ys.mean() + 0.5

    grid_y, grid_x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]] + 0.5
    overlaps = []
    for shape in SHAPES:
        ideal = shape_distance(shape, grid_x - cx, grid_y - cy, np.sqrt(area / np.pi)) < 0
        overlaps.append((ideal & body).sum() / max(1, (ideal | body).sum()))

    near_object = ndimage.binary_dilation(mask, iterations=2)
    stray = ((nearest != background) & ~near_object).mean() + (
        (nearest != color) & ndimage.binary_erosion(mask, iterations=2)
    ).mean()
    clean = (
        area >= MIN_IN_ONE_PIECE * mask.sum()
        and AREA_RANGE[0] <= area <= AREA_RANGE[1]
        and stray <= MAX_STRAY
    )
    return Frame(color, background, np.array(overlaps), area, (float(cx), float(cy)), bool(clean))


def read_clip(pixels: np.ndarray) -> Reading:
    """Read one clip, uint8 `[F, H, W, 3]` (F = 1 for an image).

    Its structure is intact if every frame is clean and its object has the clip's colours and shape.
    """
    frames = [read_frame(frame) for frame in pixels]
    centers = np.array([f.center for f in frames])
    areas = np.array([f.area for f in frames])
    shape = int(np.mean([f.overlaps for f in frames], axis=0).argmax())
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1) if len(frames) > 1 else np.zeros(1)
    structure = (
        all(f.clean and f.overlaps[shape] >= MIN_OVERLAP for f in frames)
        and len({(f.color, f.background) for f in frames}) == 1
        and areas.max() <= MAX_AREA_RATIO * areas.min()
        and steps.max() <= MAX_STEP
    )

    def vote(values):
        return int(np.bincount(values).argmax())

    return Reading(
        color=COLOR_NAMES[vote([f.color for f in frames])],
        shape=SHAPES[shape],
        background=COLOR_NAMES[vote([f.background for f in frames])],
        direction=_direction(centers[-1] - centers[0]),
        structure=bool(structure),
        travel=float(np.linalg.norm(centers[-1] - centers[0])),
    )


def travel(pixels: np.ndarray) -> torch.Tensor:
    """How many pixels the object of each clip, uint8 `[n, F, H, W, 3]`, travels: `[n]`; see Reading."""
    return torch.tensor([read_clip(clip).travel for clip in pixels])


def _direction(way: np.ndarray) -> str | None:
    """The direction of a displacement (x, y) in pixels; None if it is short or diagonal."""
    name, along = max(
        ((n, float(way @ np.array(d))) for n, d in DIRECTIONS.items()), key=lambda pair: pair[1]
    )
    across = float(np.linalg.norm(way)) ** 2 - along**2
    return name if along >= MIN_TRAVEL and across <= (along / 2) ** 2 else None
