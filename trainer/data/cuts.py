"""Decide how each file is cut: its bucket (size and number of frames), and the clips of a long video."""

import math
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from apt_core.errors import AptError
from apt_core.models.latents import check_size
from trainer.data.captions import Item
from trainer.data.media import check_image, probe, read_image, read_video, shown, too_short
from trainer.data.stills import Note, silent


@dataclass(frozen=True)
class Clip:
    """One sample to encode: `frames` frames of a file from `start` seconds on.

    height, width: in pixels; number: which of the file's clips this is, counted from 0.
    """

    item: Item
    height: int
    width: int
    frames: int
    start: float = 0.0
    number: int = 0

    @property
    def bucket(self) -> tuple:
        """(kind, height, width, frames). Clips in the same bucket can share a batch."""
        return self.item.kind, self.height, self.width, self.frames


@dataclass(frozen=True)
class Cut:
    """How files are cut into samples.

    height, width (pixels), frames (4 n + 1), fps: of a video.
    image_height, image_width: of an image, by default as for a video; image_frames: how many frames it fills.
    aspects, shorter, clips_per_file: see trainer.config.Data.
    stride: frames and pixels per latent of the VAE, as (frames, rows, columns).

    Raises AptError for sizes that do not fit the VAE and the transformer's patches, and for aspects that are
    not written as "width:height".
    """

    height: int
    width: int
    frames: int
    fps: float
    kinds: tuple[str, ...] = ("image", "video")
    image_height: int | None = None
    image_width: int | None = None
    image_frames: int = 1
    aspects: tuple[str, ...] = ()
    shorter: tuple[int, ...] = ()
    clips_per_file: int = 1
    stride: tuple[int, int, int] = (4, 8, 8)

    def __post_init__(self):
        if self.fps <= 0 or self.frames < 1:
            raise AptError(f"{self.frames} frames at {self.fps:g} fps cannot be read: both must be above 0.")
        for kind in self.kinds:
            what, counts = (
                ("a video", self._lengths) if kind == "video" else ("an image", [self.image_frames])
            )
            for size, frames in product(self.sizes(kind), counts):
                check_size(*size, frames, self.stride, what=f"precompute: {what}")
        for one, other in pairwise(self._lengths):
            if one == other:
                raise AptError(
                    f"shorter names {one} frames twice, or the same number as frames: name each length once."
                )

    def sizes(self, kind: str) -> list[tuple[int, int]]:
        """(height, width) in pixels of each bucket for "image" or "video".

        There is one per aspect, rounded to whole patches, with about as many pixels as that kind's own size.
        """
        return [self._bucket(kind, aspect) for aspect in self.aspects] or [self._size(kind)]

    def plan(self, item: Item) -> list[Clip]:
        """The clips of a file. Only the first frame of a video is decoded.

        Raises AptError when the file cannot be read or is too short.
        """
        if item.kind == "image":
            check_image(item.path)
            return [Clip(item, *self._nearest(item), self.image_frames)]
        rate, lengths = self.fps, self._lengths
        seconds = shown(item.path, self.clips_per_file * lengths[0] / rate)
        fitting = [frames for frames in lengths if (frames - 1) / rate < seconds]
        if not fitting:
            raise too_short(item.path, seconds, lengths[-1], rate)
        frames = fitting[0]
        starts = [number * frames / rate for number in range(self.clips_per_file)]
        size = self._nearest(item)
        return [
            Clip(item, *size, frames, start, number)
            for number, start in enumerate(starts)
            if start + (frames - 1) / rate < seconds
        ]

    def read(self, clip: Clip, note: Note = silent) -> np.ndarray:
        """The clip's pixels, uint8 `[F, H, W, 3]`. note: called with what was converted, if anything.

        Raises AptError for a damaged file.
        """
        if clip.item.kind == "video":
            return read_video(
                clip.item.path, clip.frames, self.fps, clip.height, clip.width, clip.start, note
            )
        return read_image(clip.item.path, clip.height, clip.width, note).repeat(clip.frames, axis=0)

    @property
    def _lengths(self) -> list[int]:
        return sorted((self.frames, *self.shorter), reverse=True)

    def _size(self, kind: str) -> tuple[int, int]:
        return (
            (self.image_height or self.height, self.image_width or self.width)
            if kind == "image"
            else (self.height, self.width)
        )

    def _bucket(self, kind: str, aspect: str) -> tuple[int, int]:
        height, width = self._size(kind)
        try:
            ratio = float(aspect.partition(":")[0]) / float(aspect.partition(":")[2])
            tall = math.sqrt(height * width / ratio)
        except (ValueError, ZeroDivisionError):
            raise AptError(f"aspect {aspect!r} is not width:height: write it like 16:9.") from None
        if math.isclose(ratio, width / height, rel_tol=0.05):
            return height, width
        down, across = 2 * self.stride[1], 2 * self.stride[2]  # a patch is 2 x 2 latents
        return max(down, round(tall / down) * down), max(across, round(tall * ratio / across) * across)

    def _nearest(self, item: Item) -> tuple[int, int]:
        sizes = self.sizes(item.kind)
        if len(sizes) == 1:
            return sizes[0]
        media = probe(item.path)
        return min(sizes, key=lambda size: abs(math.log(size[1] / size[0] * media.height / media.width)))
