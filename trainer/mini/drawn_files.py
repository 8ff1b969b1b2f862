"""Write the miniature's drawn data as real files."""

from collections.abc import Callable
from pathlib import Path

from apt_core.files.atomic import make_folder, replacing
from apt_core.files.media_write import write_image, write_video
from trainer.config import Data
from trainer.mini.clips import draw


def draw_files(folder: Path, data: Data, seed: int, report: Callable) -> None:
    """Draw PNG images and near-lossless H.264 clips into `folder`, each with its caption in a .txt file.

    Correct files that are there already are not touched: their modification time identifies their latents.
    """
    make_folder(folder)
    total = data.images + data.clips
    for moving, count, done in ((False, data.images, 0), (True, data.clips, data.images)):
        for i in range(count):
            pixels, scenes = draw(seed + 5000, [i], moving, data.frames if moving else 1)
            stem = folder / f"{'clip' if moving else 'image'}-{i:05d}"
            if moving:
                write_video(
                    stem.with_suffix(".mp4"),
                    pixels[0],
                    data.fps,
                    crf=8,
                    pixel_format="yuv444p",
                    keep_equal=True,
                )
            else:
                write_image(stem.with_suffix(".png"), pixels[0, 0], keep_equal=True)
            with replacing(stem.with_suffix(".txt"), keep_equal=True) as part:
                part.write_text(scenes[0].caption + "\n", encoding="utf-8")
            report(done + i + 1, total)
