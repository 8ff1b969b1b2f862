"""Write pixels to video and image files (PyAV, Pillow), also while the pixels are still being made. Pixels
are uint8 RGB arrays.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import AptError
from .atomic import replacing

ABOUT = "comment"
"""The entry of a file's header that holds facts about the file, as JSON."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    crf: int = 16,
    pixel_format: str = "yuv420p",
    *,
    keep_equal: bool = False,
    about: Mapping | None = None,
) -> None:
    """Write uint8 `[F, H, W, 3]` as H.264 in an .mp4 that can play while it loads, tagged BT.709. The file
    appears whole or not at all.

    crf: 0 (largest) to 51; pixel_format: "yuv420p" for players, "yuv444p" with a crf of 10 or less for clips
    to train on.
    keep_equal: when the file already holds the same bytes, leave it as it is; about: as in `video_writer`.
    Raises AptError for pixels of another shape or type, odd sides in yuv420p, another suffix, and when the
    file cannot be written.
    """
    frames = _checked(Path(path), frames, 4)
    _, height, width, _ = frames.shape
    with video_writer(
        path, height, width, fps, crf, pixel_format, keep_equal=keep_equal, about=about
    ) as write:
        write(frames)


@contextmanager
def video_writer(
    path: str | Path,
    height: int,
    width: int,
    fps: float,
    crf: int = 16,
    pixel_format: str = "yuv420p",
    *,
    keep_equal: bool = False,
    about: Mapping | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that takes the next frames, uint8 `[n, height, width, 3]`, and encodes them at once.
    Otherwise like `write_video`.

    about: facts for the file's header, JSON values by name (`trainer.data.media.read_about` reads them).
    """
    path = Path(path)
    check_name(path, frames=2)
    if not (math.isfinite(fps) and fps > 0):
        raise AptError(f"{path}: the frame rate is {fps:g}, but must be above 0.")
    if pixel_format not in ("yuv420p", "yuv444p") or "libx264" not in av.codecs_available:
        raise AptError(
            f"{path}: this PyAV cannot write {pixel_format} with libx264: "
            "use yuv420p or yuv444p, and a PyAV from PyPI."
        )
    if pixel_format == "yuv420p" and (height % 2 or width % 2):
        raise AptError(
            f"{path}: yuv420p needs even sides, but the frames are {width}x{height}: "
            "crop them or use yuv444p."
        )
    with (
        replacing(path, also=(FFmpegError,), keep_equal=keep_equal) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        if about:
            container.metadata[ABOUT] = json.dumps(about)
        stream = container.add_stream("libx264", rate=rational(fps))
        stream.width, stream.height, stream.pix_fmt, stream.options = (
            width,
            height,
            pixel_format,
            {"crf": str(crf)},
        )
        # with it the same frames give other files from run to run
        stream.options |= {"x264-params": "no-mbtree=1"}
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        if height * width <= 256 * 256:
            codec.thread_count = 1  # starting threads takes longer than a small clip

        def write(frames: np.ndarray) -> None:
            for pixels in _checked(path, frames, 4):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pixel_format, dst_colorspace="ITU709")))

        yield write
        container.mux(stream.encode())


def write_image(
    path: str | Path, pixels: np.ndarray, *, keep_equal: bool = False, about: Mapping | None = None
) -> None:
    """Write uint8 `[H, W, 3]` (or `[1, H, W, 3]`) in the format of the suffix; the file appears whole or not
    at all. Raises AptError as `write_video`.

    about: as in `video_writer`; of the image formats only .png keeps it.
    """
    path, pixels = Path(path), np.asarray(pixels)
    pixels = _checked(path, pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels, 3)
    check_name(path, frames=1)
    header = {}
    if about and path.suffix.lower() == ".png":
        header["pnginfo"] = PngInfo()
        header["pnginfo"].add_text(ABOUT, json.dumps(about))
    with replacing(path, keep_equal=keep_equal) as partial:
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format=kind, **header)


def check_name(path: str | Path, frames: int) -> None:
    """Raise AptError when so many frames cannot be written to a file of that name: one frame makes a picture,
    more make a video.
    """
    suffix = Path(path).suffix.lower()
    if frames > 1 and suffix != ".mp4":
        raise AptError(f"{path}: videos are written as .mp4, give a name that ends so.")
    if frames == 1 and suffix not in IMAGE_SUFFIXES:
        raise AptError(
            f"{path}: no image can be written with this suffix, give one of {' '.join(IMAGE_SUFFIXES)}."
        )


def rational(value: float) -> Fraction:
    """A frame rate or a time as the fraction that FFmpeg needs: 23.976 becomes 24000/1001, which is close."""
    return Fraction(value).limit_denominator(100_000)


def _checked(path: Path, pixels, dims: int) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or 0 in pixels.shape:
        want = "[F, H, W, 3]" if dims == 4 else "[H, W, 3]"
        raise AptError(
            f"{path}: pixels of shape {list(pixels.shape)} and type {pixels.dtype} were given, "
            f"but {want} in uint8 are needed."
        )
    return pixels
