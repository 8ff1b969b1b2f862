"""The miniature's own data as real files."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_core.errors import AptError
from apt_core.files.media_write import write_image, write_video
from trainer.config import Data
from trainer.files import make_folder
from trainer.mini.clips import draw


def draw_files(folder: Path, data: Data, seed: int, report: Callable) -> None:
    """Draw the miniature's own data as real files with sidecar captions: PNG images and near-lossless H.264 clips. What is there and right stays."""
    make_folder(folder)
    total = data.images + data.clips
    for moving, count, done in ((False, data.images, 0), (True, data.clips, data.images)):
        for i in range(count):
            pixels, scenes = draw(seed + 5000, [i], moving, data.frames if moving else 1)
            stem = folder / f"{'clip' if moving else 'image'}-{i:05d}"
            with _unless_equal(stem.with_suffix(".mp4" if moving else ".png")) as path:
                write_video(path, pixels[0], data.fps, crf=8, pixel_format="yuv444p") if moving else write_image(path, pixels[0, 0])
            with _unless_equal(stem.with_suffix(".txt")) as path:
                path.write_text(scenes[0].caption + "\n", encoding="utf-8")
            report(done + i + 1, total)


@contextmanager
def _unless_equal(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` unless that holds the same bytes: a drawn file keeps its age, by which its latents are known."""
    made = path.with_name(f".new-{path.name}")
    try:
        yield made
        if path.is_file() and path.read_bytes() == made.read_bytes():
            return
        os.replace(made, path)
    except OSError as error:
        raise AptError(f"{path} could not be written ({error.strerror or error}): check the folder and its free space.") from None
    finally:
        made.unlink(missing_ok=True)
