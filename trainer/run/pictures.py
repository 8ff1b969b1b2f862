"""Comparison sheets and the sample video of a run."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apt_core.errors import AptError
from apt_core.files.media_write import write_image, write_video

INK, PAPER, GAP, LABEL = (20, 20, 24), (255, 255, 255), 8, 34


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """uint8 `[..., H, W, 3]`, every pixel `factor` times as large."""
    return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)


def filmstrip(clip: np.ndarray, factor: int = 2) -> np.ndarray:
    """First, middle and last frame of `[F, H, W, 3]` side by side; an image stays one picture."""
    frames = [0] if len(clip) == 1 else [0, len(clip) // 2, len(clip) - 1]
    return np.concatenate([enlarge(clip[i], factor) for i in frames], axis=1)


def comparison(path: Path, titles: list[str], prompts: list[str], cells: list[list[np.ndarray]]) -> None:
    """Write a sheet with one row per prompt and one column per model. `cells[row][column]` are clips, uint8
    `[F, H, W, 3]`. Raises AptError if `path` cannot be written.
    """
    strips = [[filmstrip(cell, factor=2 if len(cell) > 1 else 3) for cell in row] for row in cells]
    height, width = strips[0][0].shape[:2]
    font = ImageFont.load_default(size=15)
    sheet = Image.new(
        "RGB", (GAP + (width + GAP) * len(titles), LABEL + (height + GAP + LABEL) * len(prompts)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((GAP + (width + GAP) * column, 9), _fit(title, font, width), INK, font=font)
    for row, (prompt, line) in enumerate(zip(prompts, strips)):
        top = LABEL + (height + GAP + LABEL) * row
        for column, strip in enumerate(line):
            sheet.paste(Image.fromarray(strip), (GAP + (width + GAP) * column, top))
        pen.text((GAP, top + height + 6), _fit(prompt, font, sheet.width - 2 * GAP), INK, font=font)
    write_image(path, np.asarray(sheet))


def _fit(text: str, font, width: int) -> str:
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "\u2026"
    return text


def sample_video(path: Path, clips: np.ndarray, fps: float, factor: int = 4, loops: int = 4) -> None:
    """Write a video of up to 16 clips `[n, F, H, W, 3]` in a square, repeated `loops` times so that it is
    longer than a second. Raises AptError if there are no clips, or `path` cannot be written.
    """
    side = max(1, min(4, int(len(clips) ** 0.5)))
    if not len(clips):
        raise AptError("there are no samples to write a video of; ask for at least one.")
    rows = [np.concatenate(list(clips[r * side : (r + 1) * side]), axis=2) for r in range(side)]
    grid = enlarge(np.concatenate(rows, axis=1), factor)
    write_video(path, np.concatenate([grid] * loops), fps, crf=16, pixel_format="yuv420p")
