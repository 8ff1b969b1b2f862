"""Decode a video's frames as a screen would show them (PyAV): deinterlaced, in BT.709, over white."""

from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from apt_core.errors import AptError
from trainer.data.colour import HDR, WIDE, check_colours, conversion, to_sdr
from trainer.data.stills import Note, over_white

WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop the alpha of a .webm
UNKNOWN = 2  # H.273's code for "unspecified"
BT2020_MATRIX = 9


def check_footage(path, stream, frame) -> None:
    """Raise AptError if the stream and its first frame show that the video cannot be decoded correctly."""
    transfer, primaries, matrix = _codes(frame, stream)
    check_colours(path, transfer, primaries, 0 if frame.format.is_rgb else matrix)
    _alpha_decoder(path, stream)
    if frame.interlaced_frame and "bwdif" not in av.filter.filters_available:
        raise AptError(
            f"{path} is interlaced, and this FFmpeg has no bwdif: deinterlace it, or take a PyAV from PyPI."
        )


def frames_of(path, container, stream, note: Note) -> Iterator:
    """The frames in display order, with alpha if the video has it.

    Interlaced frames go through bwdif, which makes one frame of each pair of fields.
    """
    return _whole(_decoded(path, container, stream), note)


def picture(path, stream, frame, note: Note) -> Image.Image:
    """A frame as an 8-bit RGB image. Raises AptError for colours that cannot be converted."""
    transfer, primaries, matrix = _codes(frame, stream)
    check_colours(path, transfer, primaries, 0 if frame.format.is_rgb else matrix)
    deep = transfer in HDR or primaries in WIDE
    clear = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    if matrix == UNKNOWN and not frame.format.is_rgb:
        # Players assume BT.709 for HD without a tag; FFmpeg would assume BT.601.
        matrix = BT2020_MATRIX if deep else 1 if frame.height >= 720 else UNKNOWN
        if matrix != UNKNOWN:
            frame.colorspace = matrix
    pixels = frame.to_ndarray(
        format=("rgba64le" if clear else "rgb48le") if deep else "rgba" if clear else "rgb24"
    )
    opacity = None
    if clear:
        opacity = Image.fromarray((pixels[..., 3] >> 8 if deep else pixels[..., 3]).astype(np.uint8))
        pixels = pixels[..., :3]
    if deep:
        note(conversion(transfer, primaries))
        pixels = to_sdr(pixels, transfer, primaries)
    return over_white(Image.fromarray(np.ascontiguousarray(pixels)), opacity, note)


def _codes(frame, stream) -> tuple[int, int, int]:
    """H.273's codes for transfer, primaries and matrix.

    Some versions of PyAV do not have the first two on frames; then they come from the stream.
    """
    context = stream.codec_context
    transfer, primaries = (
        int(getattr(frame, name, getattr(context, name))) for name in ("color_trc", "color_primaries")
    )
    return transfer, primaries, int(frame.colorspace)


def _alpha_decoder(path, stream) -> str | None:
    """The decoder to use for a .webm that is marked as having alpha; None for any other video.

    Raises AptError if this FFmpeg does not have that decoder.
    """
    says = any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())
    name = WITH_ALPHA.get(stream.codec_context.name) if says else None
    if name is not None:
        try:
            av.codec.Codec(name, "r")
        except av.codec.codec.UnknownCodecError:
            raise AptError(
                f"{path} is transparent, and this FFmpeg has no {name} to read that: "
                "lay it over a background first."
            ) from None
    return name


def _decoded(path, container, stream) -> Iterator:
    name = _alpha_decoder(path, stream)
    if name is None:
        yield from container.decode(stream)
        return
    context = av.CodecContext.create(name, "r")
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)
        if not packet.size:
            return


def _whole(frames: Iterator, note: Note) -> Iterator:
    graph = shape = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        now = frame.width, frame.height, frame.format.name, frame.time_base
        if now != shape:
            if graph is not None:
                yield from _finish(graph)
            graph, shape = _deinterlacer(frame), now
            note("interlaced frames made whole (bwdif)")
        graph.push(frame)
        yield from _ready(graph)
    if graph is not None:
        yield from _finish(graph)


def _deinterlacer(frame) -> av.filter.Graph:
    """A bwdif filter; it passes progressive frames through unchanged."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    bwdif, sink = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _ready(graph: av.filter.Graph) -> Iterator:
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def _finish(graph: av.filter.Graph) -> Iterator:
    graph.push(None)
    yield from _ready(graph)
