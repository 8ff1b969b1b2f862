"""The pictures beside the workflows, as the template browser shows them: 16 to 9, JPEG."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 1024, 576
BACKGROUND = (24, 24, 24)
COLUMNS, TILE, GAP = 4, 240, 12


def read_video(path: Path) -> np.ndarray:
    """All frames, uint8 [F, H, W, 3]."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def card_of_videos(videos: list[Path], out: Path) -> None:
    """Eight frames in two rows: of one video its way through time, of two videos a row each."""
    rows = 2 // len(videos)
    frames = []
    for video in videos:
        pixels = read_video(video)
        frames += list(pixels[np.linspace(0, len(pixels) - 1, rows * COLUMNS).round().astype(int)])
    card = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    left = (WIDTH - COLUMNS * TILE - (COLUMNS - 1) * GAP) // 2
    top = (HEIGHT - 2 * TILE - GAP) // 2
    for i, frame in enumerate(frames):
        tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.LANCZOS)
        card.paste(tile, (left + i % COLUMNS * (TILE + GAP), top + i // COLUMNS * (TILE + GAP)))
    card.save(out, quality=88)


def card_of_picture(picture: Path, out: Path) -> None:
    """The whole picture in the middle of the card."""
    with Image.open(picture) as image:
        image = image.convert("RGB")
        image.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    card = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    card.paste(image, ((WIDTH - image.width) // 2, (HEIGHT - image.height) // 2))
    card.save(out, quality=88)
