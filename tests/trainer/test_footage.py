"""Interlaced, HDR and transparent videos: made with PyAV, read back, and compared with the values that a
screen would show.
"""

from fractions import Fraction

import av
import numpy as np
import pytest
from light import code, pq_signal
from PIL import Image

from apt_core.errors import AptError
from apt_core.files.media_write import write_video
from trainer.data import footage
from trainer.data.colour import BT2020, HLG, P3, PQ, WHITE, to_bt709, tone_map
from trainer.data.media import check_video, probe, read_video

HALF = np.zeros((32, 32, 4), np.uint8)
HALF[..., :3] = 200, 0, 0  # hidden in the lower half
HALF[:16, :, 3] = 255


def write(path, codec, pixels, frames, options=None, tag=None, flags=()):
    """frames: VideoFrames; tag: told of each frame before it is encoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pixels
        for name, value in flags:
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, frames=3, size=(32, 32)):
    notes: list[str] = []
    check_video(path, frames, 24)
    return read_video(path, frames, 24, *size, note=notes.append), sorted(set(notes))


def weave(frames):
    """The same frames, marked as two fields each, the upper line first."""
    graph = av.filter.Graph()
    first = frames[0]
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 24)
    )
    mark, sink = graph.add("setfield", "tff"), graph.add("buffersink")
    source.link_to(mark)
    mark.link_to(sink)
    graph.configure()
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, Fraction(1, 24)
        graph.push(frame)
        yield graph.pull()


def fields(number: int) -> np.ndarray:
    """Grey 16 k + 16 in the field that comes first, and 16 k + 24 in the other: what brightens in time is
    combed in a frame.
    """
    picture = np.full((32, 32, 3), 16 * number + 16, np.uint8)
    picture[1::2] += 8
    return picture


def grey(pictures, format="yuv420p"):
    return [
        av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=format) for picture in pictures
    ]


INTERLACED = {"flags": "+ildct+ilme", "qscale": "1"}


@pytest.mark.parametrize("name", ["a.mkv", "a.mpg"])
def test_interlaced_frames_are_made_whole_and_keep_their_times(tmp_path, name):
    path = write(
        tmp_path / name, "mpeg2video", "yuv420p", list(weave(grey(map(fields, range(12))))), INTERLACED
    )
    got, notes = read(path, 11)
    assert notes == ["interlaced frames made whole (bwdif)"]
    assert np.abs(got[:, 1:].astype(int) - got[:, :-1]).max() <= 2  # no line differs from the next
    assert np.abs(got.mean((1, 2, 3)) - (16 * np.arange(11) + 16)).max() <= 2.5
    assert np.abs(read_video(path, 3, 8, 32, 32).mean((1, 2, 3)) - [16, 64, 112]).max() <= 2.5


def test_progressive_lines_are_left_alone(tmp_path):
    path = write(tmp_path / "a.mkv", "ffv1", "yuv420p", grey(map(fields, range(6))))
    got, notes = read(path)
    assert notes == [] and np.abs(got[:, 1::2].astype(int) - got[:, ::2] - 8).max() <= 1


def test_only_the_interlaced_frames_of_a_file_are_touched():
    plain = grey(map(fields, range(12)))
    for number, frame in enumerate(plain):
        frame.pts, frame.time_base = number, Fraction(1, 24)
    marked = list(weave(grey(map(fields, range(12)))))
    frames, notes = [*plain[:3], *marked[3:8], *plain[8:]], []
    got = list(footage._whole(iter(frames), notes.append))
    combed = [np.ptp(frame.to_ndarray(format="rgb24")[:, 16, 0].astype(int)) > 5 for frame in got]
    assert combed == [not frame.interlaced_frame for frame in frames] and sum(combed) == 7
    assert [frame.pts * frame.time_base for frame in got] == [Fraction(number, 24) for number in range(12)]
    assert notes == ["interlaced frames made whole (bwdif)"]


def test_without_the_filter_they_are_refused(tmp_path, monkeypatch):
    path = write(
        tmp_path / "a.mkv", "mpeg2video", "yuv420p", list(weave(grey(map(fields, range(6))))), INTERLACED
    )
    monkeypatch.setattr(footage.av.filter, "filters_available", {"yadif"})
    with pytest.raises(AptError, match="a.mkv is interlaced, and this FFmpeg has no bwdif: deinterlace it"):
        check_video(path, 3, 24)


def graded(path, rgb, transfer, primaries, tagged=True):
    """A file of one colour; rgb: its signal in [0, 1]."""
    flags = [
        ("color_trc", transfer),
        ("color_primaries", primaries),
        ("colorspace", 9 if tagged else 2),
        ("color_range", 1),
    ]
    frames = []
    for _ in range(4):
        picture = np.broadcast_to(np.rint(np.asarray(rgb) * 65535).astype(np.uint16), (32, 32, 3)).copy()
        frame = av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(
            format="yuv444p10le", dst_colorspace=9
        )
        for name, value in flags:
            if hasattr(frame, name):
                setattr(frame, name, value)
        frames.append(frame)
    return write(path, "ffv1", "yuv444p10le", frames, flags=flags)


@pytest.mark.parametrize("tagged", [True, False])
def test_pq_is_tone_mapped(tmp_path, tagged):
    for number, light in enumerate(([0.25, 0.25, 0.25], [0.4, 0.1, 0.05], [3.0, 1.5, 0.6])):
        signal = [pq_signal(WHITE * part) for part in np.linalg.inv(to_bt709(BT2020)) @ light]
        got, notes = read(graded(tmp_path / f"{number}.mkv", signal, PQ, BT2020, tagged))
        top = max(light)
        expected = code(np.array(light) / top * tone_map(np.array(top)))
        assert notes == ["tone mapped from PQ to SDR in BT.709"]
        assert np.abs(got.reshape(-1, 3) - expected).max() <= 3, (light, got[0, 0, 0], expected)


def test_hlg_and_wide_gamuts_are_converted(tmp_path):
    got, notes = read(graded(tmp_path / "hlg.mkv", [0.75] * 3, HLG, BT2020))
    assert (
        notes == ["tone mapped from HLG to SDR in BT.709"]
        and np.abs(got - code(tone_map(np.array(1.0)))).max() <= 2
    )
    for name, primaries, code_of in (("BT.2020", BT2020, 14), ("Display P3", P3, 1)):
        colour = np.array([0.3, 0.4, 0.2])
        got, notes = read(graded(tmp_path / f"{primaries}.mkv", colour ** (1 / 2.4), code_of, primaries))
        assert notes == [f"colours converted from {name} to BT.709"]
        assert np.abs(got.reshape(-1, 3) - code(to_bt709(primaries) @ colour)).max() <= 2


def test_colours_that_nothing_converts_are_refused_before_anything_is_read(tmp_path):
    path = graded(tmp_path / "linear.mkv", [0.5] * 3, 8, 1)
    for look in (
        lambda: probe(path),
        lambda: check_video(path, 2, 24),
        lambda: read_video(path, 2, 24, 32, 32),
    ):
        with pytest.raises(
            AptError,
            match=(
                r"linear.mkv has colours that cannot be converted \(linear light\): export it in BT.709, PQ"
            ),
        ):
            look()


TRANSPARENT = [
    ("a.webm", "libvpx-vp9", "yuva420p", {}),
    ("b.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("a.mov", "prores_ks", "yuva444p10le", {}),
    ("b.mov", "qtrle", "argb", {}),
    ("c.mov", "png", "rgba", {}),
    ("a.mkv", "ffv1", "bgra", {}),
]


@pytest.mark.parametrize("name, codec, pixels, options", TRANSPARENT)
def test_transparent_videos_lie_over_white(tmp_path, name, codec, pixels, options):
    for picture, expected in (
        (HALF, ["transparent parts laid over white"]),
        (np.maximum(HALF, np.uint8([0, 0, 0, 255])), []),
    ):
        frames = [av.VideoFrame.from_ndarray(picture, format="rgba") for _ in range(4)]
        got, notes = read(write(tmp_path / name, codec, pixels, frames, options))
        below = [255, 255, 255] if expected else [200, 0, 0]
        assert notes == expected
        assert (
            np.abs(got[:, 4].astype(int) - [200, 0, 0]).max() <= 4
            and np.abs(got[:, 28].astype(int) - below).max() <= 4
        )


def test_half_transparent_is_half_white(tmp_path):
    picture = np.broadcast_to(np.uint8([200, 0, 100, 51]), (32, 32, 4)).copy()
    got, _ = read(
        write(
            tmp_path / "a.mkv",
            "ffv1",
            "bgra",
            [av.VideoFrame.from_ndarray(picture, format="rgba") for _ in range(4)],
        )
    )
    assert np.abs(got.astype(int) - [244, 204, 224]).max() <= 1  # a fifth of the colour


def test_a_gif_with_transparency(tmp_path):
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.paste(1, (0, 0, 32, 16))
    picture.save(
        tmp_path / "a.gif",
        transparency=0,
        save_all=True,
        append_images=[picture.copy() for _ in range(8)],
        duration=40,
        disposal=2,
    )
    got, notes = read(tmp_path / "a.gif", 1)
    assert notes == ["transparent parts laid over white"]
    assert got[0, 4, 4].tolist() == [0, 255, 0] and got[0, 28, 28].tolist() == [255, 255, 255]


def test_without_a_decoder_for_it_a_transparent_webm_is_refused(tmp_path, monkeypatch):
    frames = [av.VideoFrame.from_ndarray(HALF, format="rgba") for _ in range(4)]
    path = write(tmp_path / "a.webm", "libvpx-vp9", "yuva420p", frames)
    monkeypatch.setitem(footage.WITH_ALPHA, "vp9", "no-such-decoder")
    with pytest.raises(
        AptError,
        match="a.webm is transparent, and this FFmpeg has no no-such-decoder to read that: lay it over",
    ):
        check_video(path, 3, 24)


def test_hdr_that_is_transparent_too_is_both(tmp_path):
    picture = np.zeros((32, 32, 4), np.uint16)
    picture[..., :3] = round(pq_signal(WHITE / 4) * 65535)
    picture[:16, :, 3] = 65535
    flags = [("color_trc", PQ), ("color_primaries", BT2020)]
    frames = [av.VideoFrame.from_ndarray(picture, format="rgba64le") for _ in range(4)]
    for frame in frames:
        for name, value in flags:
            if hasattr(frame, name):
                setattr(frame, name, value)
    got, notes = read(write(tmp_path / "a.mkv", "ffv1", "rgba64le", frames, flags=flags))
    assert notes == ["tone mapped from PQ to SDR in BT.709", "transparent parts laid over white"]
    assert np.abs(got[:, 4].astype(int) - code(0.25)).max() <= 2 and (got[:, 28] == 255).all()


def test_an_ordinary_video_is_said_nothing_of(tmp_path):
    write_video(tmp_path / "a.mp4", np.full((4, 32, 32, 3), 90, np.uint8), 24, crf=4, pixel_format="yuv444p")
    got, notes = read(tmp_path / "a.mp4")
    assert notes == [] and np.abs(got.astype(int) - 90).max() <= 2
