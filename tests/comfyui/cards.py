"""The pictures beside the workflows, as the template browser shows them: 16 to 9, JPEG."""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1024, 576
BACKGROUND = (24, 24, 24)
COLUMNS, TILE, GAP = 4, 240, 12


def read_video(path: Path) -> np.ndarray:
    """All frames, uint8 [F, H, W, 3]."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def card_of_outputs(files: list[Path], out: Path) -> None:
    """Eight frames in two rows: the first pictures where there are some, else of one video its way through
    time, of two videos a row each, of more the middle of each.
    """
    pictures = [file for file in files if file.suffix == ".png"]
    frames = [frame for file in pictures[: 2 * COLUMNS] for frame in read_video(file)]
    for video in files if not pictures else []:
        pixels, tiles = read_video(video), max(2 // len(files) * COLUMNS, 1)
        ends = (0, len(pixels) - 1) if tiles > 1 else [len(pixels) // 2] * 2
        frames += list(pixels[np.linspace(*ends, tiles).round().astype(int)])
    card = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    left = (WIDTH - COLUMNS * TILE - (COLUMNS - 1) * GAP) // 2
    top = (HEIGHT - 2 * TILE - GAP) // 2
    for i, frame in enumerate(frames[: 2 * COLUMNS]):
        tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.LANCZOS)
        card.paste(tile, (left + i % COLUMNS * (TILE + GAP), top + i // COLUMNS * (TILE + GAP)))
    card.save(out, quality=88)


def card_of_words(words: tuple[str, ...], out: Path) -> None:
    """What a graph makes, how, and what it needs, large enough for the template browser's 300 pixels; then a
    fourth line, or how the trainer makes it.
    """
    card = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(card)
    title, how, needs, made_by = (*words, "python -m trainer makes it from your clips")[:4]
    lines = (
        (title, 68, 90, "white"),
        (how, 44, 196, "#a8c0d8"),
        (needs, 44, 350, "#e8c060"),
        (made_by, 40, 430, "#9a9a9a"),
    )
    for text, size, top, color in lines:
        font = ImageFont.load_default(size)
        draw.text(((WIDTH - draw.textlength(text, font)) / 2, top), text, color, font)
    draw.line((WIDTH * 0.3, 296, WIDTH * 0.7, 296), "#505050", 3)
    card.save(out, quality=88)
