"""Read video and image files (PyAV, Pillow). Pixels are uint8 RGB arrays `[frames, height, width, 3]`."""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from apt_core.errors import AptError
from apt_core.files.media_write import ABOUT, IMAGE_SUFFIXES, rational
from trainer.data.footage import check_footage, frames_of, picture
from trainer.data.stills import MIB, Note, plain, silent, why_unknown

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
KNOWN = " ".join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
WEB_CODECS = ("h264", "vp9", "av1")  # all current browsers play these
AGAIN = "export or download it again"


@dataclass(frozen=True)
class Media:
    """What a file's header says. kind: "video" or "image".

    height, width: in pixels as shown, after rotation; fps: the average frame rate; duration: in seconds.
    An image has 1 frame, duration 0 and fps 0. If a video's header gives no duration, it is None, and so is
    `frames` unless the header counts them.
    """

    kind: str
    frames: int | None
    duration: float | None
    height: int
    width: int
    fps: float


def kind_of(path: str | Path) -> str:
    """ "video" or "image", judged by the suffix. Raises AptError for any other suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    raise AptError(
        f"{path} is of a kind that cannot be read ({suffix or 'no suffix'}): convert it to {KNOWN}."
    )


def probe(path: str | Path) -> Media:
    """A file's kind, length and size. Only the first frame of a video is decoded.

    Raises AptError for a file that cannot be opened, and for a video that cannot be shown as it should: its
    colours cannot be converted, or this FFmpeg has no decoder for its alpha or no filter for its fields.
    """
    if kind_of(path) == "image":
        with _image(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
            return Media("image", 1, 0.0, *((width, height) if turned else (height, width)), 0.0)
    with _video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise AptError(f"{path} holds no frame that can be decoded: {AGAIN}.")
        check_footage(path, stream, frame)
        height, width = (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
        rate = float(stream.average_rate or 0)
        duration = (
            float(
                stream.duration * stream.time_base
                if stream.duration
                else (container.duration or 0) / av.time_base
            )
            or None
        )
        frames = stream.frames or (round(duration * rate) if duration else None)
        return Media("video", frames, duration, height, width, rate)


def read_video(
    path: str | Path,
    frames: int,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    note: Note = silent,
) -> np.ndarray:
    """Read `frames` frames from `start` seconds on at `fps`, uint8 `[frames, height, width, 3]`.

    Frame k is the source frame nearest in time to `start + k / fps`; the source's rate may vary. The video
    must still be showing at the last of these times.
    Frames are resized (Lanczos, antialiased) until they cover height x width, then cropped to the centre.
    Rotation flags and non-square pixels are respected.
    Interlaced frames are deinterlaced; PQ, HLG and wide gamuts are converted to BT.709 (trainer.data.colour);
    transparent parts are laid over white. `note` is called for each of these.
    Raises AptError for a file that is unreadable, damaged or too short, for one without a video stream, and
    for colours that cannot be converted.
    """
    out = np.empty((frames, height, width, 3), np.uint8)
    moments = [rational(start) + k / rational(fps) for k in range(frames)]
    done, before, shown = 0, None, 0
    with _video(path) as (container, stream):
        origin, aspect = _seek(container, stream, start), float(stream.sample_aspect_ratio or 1)
        for frame, time, length in _timed(path, container, stream, note):
            origin = time if origin is None else origin
            now = time - origin
            while done < frames and moments[done] <= now:
                chosen = (
                    before if before and moments[done] - before[1] <= now - moments[done] else (frame, now)
                )
                out[done] = _pixels(path, stream, chosen[0], height, width, aspect, note)
                done += 1
            before, shown = (frame, now), length
            if done == frames:
                return out
        if before is None:
            raise AptError(f"{path} holds no frame that can be decoded: {AGAIN}.")
        end = before[1] + shown
        if moments[-1] >= end:
            raise too_short(path, end - rational(start), frames, fps)
        out[done:] = _pixels(path, stream, before[0], height, width, aspect, note)
        return out


def check_video(path: str | Path, frames: int, fps: float, start: float = 0.0) -> None:
    """Raise the AptError that `read_video` would, as far as packets and the first frame can tell.

    This is cheap: nothing but the first frame is decoded.
    """
    last = (frames - 1) / rational(fps)
    end = shown(path, float(rational(start) + last), start)
    if last >= end:
        raise too_short(path, end, frames, fps)


def shown(path: str | Path, until: float, start: float = 0.0) -> Fraction:
    """How many seconds the video lasts after `start`, by its packets' time stamps.

    Reading stops soon after `until` seconds, so the answer for a longer video is only a lower bound.
    Raises AptError if the file is unreadable or the part that was read is damaged.
    """
    last = rational(until)
    probe(path)
    with _video(path) as (container, stream):
        origin, end = _seek(container, stream, start), Fraction(0)
        gap, counted = _gap(stream), _counted(container)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise AptError(f"{path} is truncated or damaged: {AGAIN}.")
            if not packet.size:  # the empty packet at the end
                continue
            stamp = None if counted else packet.dts if packet.pts is None else packet.pts
            time = end if stamp is None else stamp * stream.time_base
            origin = time if origin is None else origin
            end = max(
                end, time + (packet.duration * stream.time_base if packet.duration and not counted else gap)
            )
            if packet.dts is not None and packet.dts * stream.time_base - origin > last:
                break
    return end - (origin or 0) - rational(start)


def read_image(path: str | Path, height: int, width: int, note: Note = silent) -> np.ndarray:
    """Read an image as uint8 `[1, height, width, 3]`.

    It is turned by its EXIF orientation, then resized and cropped as `read_video` does. An animation gives
    its first frame. Palettes, grey, 16-bit and CMYK images become RGB, an ICC profile is converted to sRGB,
    and transparent pixels are laid over white (trainer.data.stills); `note` is called for conversions that
    change colours.
    Raises AptError for a file that is unreadable or damaged, and for pixels whose white level is unknown.
    """
    with _image(path) as image:
        # A large JPEG is then decoded at a fraction of its size, which is much faster.
        image.draft("RGB", (2 * max(height, width),) * 2)
        form = image.format
        return _cover(plain(path, ImageOps.exif_transpose(image), note, form), height, width)[None]


def check_image(path: str | Path) -> None:
    """Raise the AptError that `read_image` would. A JPEG is decoded at an eighth of its size."""
    with _image(path) as image:
        image.draft("RGB", (1, 1))
        plain(path, image)


def read_about(path: str | Path) -> dict:
    """The `about` that apt_core.files.media_write put into a file's header; empty if there is none.

    Raises AptError for a file that cannot be opened.
    """
    if kind_of(path) == "image":
        with _image(path) as image:
            text = image.info.get(ABOUT)
    else:
        with _video(path) as (container, _):
            text = container.metadata.get(ABOUT)
    try:
        about = json.loads(text or "{}")
    except (TypeError, ValueError, RecursionError):  # another program's comment
        about = {}
    return about if isinstance(about, dict) else {}


def bare(path: str | Path) -> bytes:
    """The file's content for a browser, without its metadata: an .mp4 for a video, a .png for an image.

    Video packets are copied, not encoded again.
    Raises AptError for a file that is unreadable or damaged, and for a codec that not every browser plays.
    """
    out = io.BytesIO()
    if kind_of(path) == "image":
        with _image(path) as image:
            form = image.format
            plain(path, ImageOps.exif_transpose(image), form=form).save(out, "PNG")
        return out.getvalue()
    with _video(path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        if codec not in WEB_CODECS:
            raise AptError(f"{path} is in {codec}, which not every browser plays: convert it to H.264.")
        with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as copy:
            target = copy.add_stream_from_template(stream)
            target.metadata.clear()
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise AptError(f"{path} is truncated or damaged: {AGAIN}.")
                if packet.dts is not None:
                    packet.stream = target
                    copy.mux(packet)
    return out.getvalue()


@contextmanager
def _video(path: str | Path) -> Iterator[tuple]:
    """Open a video: its container and first video stream. FFmpeg's exceptions become AptError."""
    kind_of(path)
    _refuse_empty(path)
    try:
        with av.open(f"file:{path}") as container:  # without "file:", a colon in the name means a protocol
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise AptError(f"{path} has no video stream: give a file with pictures, or remove it.")
            if stream.codec_context is None:
                raise AptError(f"{path} is in a codec that this FFmpeg does not know: convert it to H.264.")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise AptError(
            f"{path} cannot be read as a video ({error.strerror or type(error).__name__}): {AGAIN}."
        ) from None


@contextmanager
def _image(path: str | Path) -> Iterator[Image.Image]:
    _refuse_empty(path)
    try:
        with Image.open(path) as image:
            yield image
    except AptError:
        raise
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        what = f"has more than the {most} million pixels that can be read"
        raise AptError(f"{path} {what}: make it smaller.") from None
    except Exception as error:  # Pillow's decoders raise a dozen types
        if "MAX_TEXT" in str(error):
            one, all_of_them = PngImagePlugin.MAX_TEXT_CHUNK // MIB, PngImagePlugin.MAX_TEXT_MEMORY // MIB
            limit = f"{one} MiB, or {all_of_them} MiB in all"
            raise AptError(
                f"{path} has a text or a colour profile of more than {limit}: save it without."
            ) from None
        if isinstance(error, UnidentifiedImageError) and (pixels := why_unknown(path)):
            raise AptError(f"{path} has {pixels}, which cannot be read: save it in 8 or 16 bits.") from None
        reason = type(error).__name__ if str(path) in str(error) else " ".join(str(error).split()).rstrip(".")
        raise AptError(f"{path} cannot be read as an image ({reason}): {AGAIN}.") from None


def _refuse_empty(path: str | Path) -> None:
    if not Path(path).is_file():
        raise AptError(f"{path} does not exist or is not a file: give the path of a video or an image.")
    if not Path(path).stat().st_size:
        raise AptError(f"{path} is empty (0 bytes): {AGAIN}.")


def _seek(container, stream, start: float) -> Fraction | None:
    """The stream's start time in seconds, or None if it has none.

    In formats with an index (.mp4, .mkv, .webm) this also seeks to the last key frame before `start`.
    """
    if _counted(container):
        return Fraction(0)
    origin = None if stream.start_time is None else stream.start_time * stream.time_base
    if start > 0 and {"mp4", "matroska"} & set(container.format.name.split(",")):
        container.seek(
            int(((origin or 0) + rational(start)) / stream.time_base), stream=stream, backward=True
        )
    return origin


def _timed(path, container, stream, note: Note) -> Iterator[tuple]:
    """(frame, time, duration) in display order, in seconds; without time stamps, at the average rate."""
    next_time, gap, counted = Fraction(0), _gap(stream), _counted(container)
    for frame in frames_of(path, container, stream, note):
        time = next_time if counted or frame.pts is None else frame.pts * frame.time_base
        length = frame.duration * frame.time_base if frame.duration and not counted else gap
        next_time = time + length
        yield frame, time, length


def _counted(container) -> bool:
    # An .avi has a constant rate by design, and its time stamps are wrong where frames are reordered.
    return container.format.name == "avi"


def _gap(stream) -> Fraction:
    return 1 / stream.average_rate if stream.average_rate else Fraction(0)


def _pixels(path, stream, frame, height: int, width: int, aspect: float, note: Note) -> np.ndarray:
    if frame.is_corrupt:
        raise AptError(f"{path} is damaged (a frame cannot be decoded whole): {AGAIN}.")
    turns = _turns(frame)
    upright = np.rot90(np.asarray(picture(path, stream, frame, note)), turns)
    image = Image.fromarray(np.ascontiguousarray(upright))
    return _cover(image, height, width, 1 / aspect if turns % 2 else aspect)


def _turns(frame) -> int:
    return round(frame.rotation / 90)


def _cover(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> np.ndarray:
    """Crop the largest centred part with the right shape and resize it, uint8 `[height, width, 3]`.

    aspect: width of a source pixel divided by its height.
    """
    w, h = image.size
    scale = max(width / (w * aspect), height / h)
    box_w, box_h = min(w, width / (scale * aspect)), min(h, height / scale)
    left, top = (w - box_w) / 2, (h - box_h) / 2
    if (box_w, box_h) == (width, height):  # only a crop: an offset of half a pixel would blur it
        left, top = int(left), int(top)
    box = (left, top, min(w, left + box_w), min(h, top + box_h))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def too_short(path, has: Fraction, frames: int, fps: float) -> AptError:
    """The error to raise for a video that lasts only `has` seconds."""
    has, need = math.floor(100 * max(has, 0)) / 100, math.ceil(100 * frames / rational(fps)) / 100
    return AptError(
        f"{path} is {has:.2f} s long, but {need:.2f} s ({frames} frames at {fps:g} fps) are needed: "
        "give a longer clip or lower frames."
    )
