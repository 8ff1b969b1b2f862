"""Draw captioned clips: one shaded object on a striped background, still or moving in one of four directions.

The caption names colour, shape, background and direction. Everything else (place, size, speed, shading, and
the stripes' direction, period and phase) varies freely, so that sharpness and diversity can be measured.
Each scene depends only on (seed, index).
"""

import re
from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.75, 0.20, 0.90),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COLOR_NAMES = tuple(COLORS)
DIRECTION_NAMES = tuple(DIRECTIONS)
# Each shape's extent (left, right, up, down), in units of the radius of a circle with equal area.
EXTENT = {
    "circle": (1, 1, 1, 1),
    "square": (0.887, 0.887, 0.887, 0.887),
    "triangle": (1.347, 1.347, 1.556, 0.778),
}

SIZE = 48
FRAMES = 9
NEGATIVE_PROMPT = "blurry, broken, deformed, bad quality"


@dataclass(frozen=True)
class Scene:
    """One drawn sample. Lengths are in pixels of a 48 px frame; `travel` is the distance over the clip."""

    color: str
    shape: str
    background: str
    direction: str | None
    radius: float
    center: tuple[float, float]
    travel: float
    shading: float
    stripe_angle: int
    stripe_period: float
    stripe_phase: float

    @property
    def caption(self) -> str:
        motion = f" moving {self.direction}" if self.direction else ""
        return f"a {self.color} {self.shape}{motion} on a {self.background} background"


def scene(seed: int, index: int, moving: bool) -> Scene:
    """Draw the random numbers of sample `index`. moving: a clip with a direction; otherwise a still image."""
    rng = np.random.default_rng([seed, index, int(moving)])
    color, background = rng.permutation(len(COLOR_NAMES))[:2]
    shape = SHAPES[rng.integers(3)]
    radius = rng.uniform(8.0, 10.0)
    travel = rng.uniform(13.0, 19.0) if moving else 0.0
    direction = DIRECTION_NAMES[rng.integers(4)] if moving else None
    left, right, top, bottom = (e * radius for e in EXTENT[shape])
    low, high = np.array([left, top]) + 0.5, SIZE - np.array([right, bottom]) - 0.5
    step = travel * np.array(DIRECTIONS[direction] if direction else (0, 0))
    # The object stays inside the frame for the whole clip, so it is never cut off.
    start = rng.uniform(low + np.maximum(-step, 0), high - np.maximum(step, 0))
    return Scene(
        color=COLOR_NAMES[color],
        shape=shape,
        background=COLOR_NAMES[background],
        direction=direction,
        radius=radius,
        center=(float(start[0]), float(start[1])),
        travel=travel,
        shading=rng.uniform(0.15, 0.35),
        stripe_angle=int(rng.integers(4)),
        stripe_period=rng.uniform(7.0, 12.0),
        stripe_phase=rng.uniform(0.0, 1.0),
    )


def is_drawn(caption: str) -> bool:
    """Whether a caption is that of a drawn clip or image."""
    return words_of(caption) is not None


def words_of(caption: str) -> dict[str, str | None] | None:
    """The colour, shape, background and direction that a drawn clip's caption names, by the names that Scene
    gives them; None for any other caption.
    """
    found = _CAPTION.fullmatch(caption)
    return found and found.groupdict()


_CAPTION = re.compile(
    rf"a (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"( moving (?P<direction>{'|'.join(DIRECTIONS)}))? on a (?P<background>{'|'.join(COLORS)}) background"
)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Signed distance of points to the shape's edge, in pixels, negative inside.

    x, y: relative to the shape's centre; radius: of the circle with the shape's area.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * (np.sqrt(np.pi) / 2)
    if shape == "triangle":
        # An upright equilateral triangle: three half planes, each at the inradius from the centroid.
        inradius = radius * np.sqrt(np.pi / (3 * np.sqrt(3)))
        slanted = np.abs(x) * (np.sqrt(3) / 2) - y * 0.5
        return np.maximum(y, slanted) - inradius
    raise ValueError(f"unknown shape {shape!r}")


def render(item: Scene, frames: int) -> np.ndarray:
    """Render one scene, uint8 `[frames, 48, 48, 3]`.

    The object moves `travel` pixels from the first frame to the last.
    """
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    angle = item.stripe_angle * np.pi / 4
    wave = (xs * np.cos(angle) + ys * np.sin(angle)) / item.stripe_period + item.stripe_phase
    # A steep sine gives stripes with edges about one pixel wide, without aliasing.
    bands = 0.5 + 0.5 * np.tanh(2.5 * np.sin(2 * np.pi * wave))
    backdrop = np.asarray(COLORS[item.background], np.float32) * (0.45 + 0.35 * bands)[..., None]

    dx, dy = DIRECTIONS[item.direction] if item.direction else (0, 0)
    progress = (
        np.linspace(0.0, 1.0, frames, dtype=np.float32)[:, None, None]
        if frames > 1
        else np.zeros((1, 1, 1), np.float32)
    )
    x = xs - (item.center[0] + dx * item.travel * progress)
    y = ys - (item.center[1] + dy * item.travel * progress)
    coverage = np.clip(0.5 - shape_distance(item.shape, x, y, item.radius), 0.0, 1.0)[..., None]
    light = 1.0 - item.shading * np.clip((x + y) / item.radius + 0.6, 0.0, 2.0)[..., None] / 2
    body = np.asarray(COLORS[item.color], np.float32) * light
    image = backdrop * (1 - coverage) + body * coverage
    return np.round(image * 255).clip(0, 255).astype(np.uint8)


def draw(seed: int, indices, moving: bool, frames: int | None = None) -> tuple[np.ndarray, list[Scene]]:
    """Draw a batch: its pixels, uint8 `[n, frames, 48, 48, 3]`, and its scenes.

    frames: by default 9 for clips and 1 for images.
    """
    frames = frames or (FRAMES if moving else 1)
    scenes = [scene(seed, int(i), moving) for i in indices]
    return np.stack([render(s, frames) for s in scenes]), scenes
