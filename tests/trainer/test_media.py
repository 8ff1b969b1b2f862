"""Pixels survive the way to a file and back, times and geometry are exact, and bad files are named in one
sentence.
"""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from apt_core.errors import AptError
from apt_core.files.media_write import write_image, write_video
from trainer.data.media import check_image, check_video, kind_of, probe, read_image, read_video


def numbered(frames: int, height: int = 32, width: int = 32, step: int = 8) -> np.ndarray:
    """Frame k is grey of brightness 8 k + 8: its number can be read off."""
    return np.stack([np.full((height, width, 3), step * (k + 1), np.uint8) for k in range(frames)])


def numbers(clip: np.ndarray, step: int = 8) -> list[int]:
    return [round(float(frame.mean()) / step) - 1 for frame in clip]


def quadrants(height: int, width: int) -> np.ndarray:
    """Red, green / blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return image


def one_sentence(error, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    for part in parts:
        assert part in text, text


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture(scope="module")
def clip24(tmp_path_factory):
    """27 numbered frames at 24 fps: 1.125 s."""
    path = tmp_path_factory.mktemp("media") / "clip24.mp4"
    write_video(path, numbered(27), 24, crf=4, pixel_format="yuv444p")
    return path


def test_near_lossless_round_trip(tmp_path):
    grid = np.kron(np.random.default_rng(0).integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    clip = np.stack([np.roll(grid, k, axis=1) for k in range(9)])
    write_video(tmp_path / "a.mp4", clip, 8, crf=4, pixel_format="yuv444p")
    assert psnr(read_video(tmp_path / "a.mp4", 9, 8, 48, 48), clip) > 45
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_players_format_keeps_smooth_colours(tmp_path):
    ramp = np.linspace(0, 255, 48).astype(np.uint8)
    clip = np.stack(
        [
            np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.uint8(100 + 9 * k)), -1)
            for k in range(9)
        ]
    )
    write_video(tmp_path / "a.mp4", clip, 8, crf=4, pixel_format="yuv420p")
    assert psnr(read_video(tmp_path / "a.mp4", 9, 8, 48, 48), clip) > 35
    start = (tmp_path / "a.mp4").read_bytes()
    assert start.index(b"moov") < start.index(b"mdat")  # faststart


def test_probe(clip24, tmp_path):
    media = probe(clip24)
    assert (media.kind, media.frames, media.duration, media.height, media.width, media.fps) == (
        "video",
        27,
        1.125,
        32,
        32,
        24,
    )
    write_image(tmp_path / "a.png", quadrants(20, 30))
    media = probe(tmp_path / "a.png")
    assert (media.kind, media.frames, media.height, media.width) == ("image", 1, 20, 30)


def test_resampling_picks_the_nearest_frames(clip24):
    assert numbers(read_video(clip24, 9, 8, 32, 32)) == list(range(0, 27, 3))
    assert numbers(read_video(clip24, 27, 24, 32, 32)) == list(range(27))
    # 16 fps is every 1.5 frames; a tie goes to the earlier one
    assert numbers(read_video(clip24, 9, 16, 32, 32)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert numbers(read_video(clip24, 5, 48, 32, 32)) == [0, 0, 1, 1, 2]


def test_a_start_time_moves_the_window(clip24):
    assert numbers(read_video(clip24, 5, 8, 32, 32, start=0.5)) == [12, 15, 18, 21, 24]
    with pytest.raises(AptError, match="is 0.62 s long, but 0.75 s"):
        read_video(clip24, 6, 8, 32, 32, start=0.5)


@pytest.mark.parametrize(
    "name, codec, pixels",
    [
        ("a.mkv", "libx264", "yuv420p"),
        ("a.avi", "libx264", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.gif", "gif", "gray"),
    ],
)
def test_other_containers(tmp_path, name, codec, pixels):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = pixels
        for frame in numbered(14, step=16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    check_video(path, 4, 8)
    assert numbers(read_video(path, 4, 8, 32, 32), 16) == [0, 3, 6, 9]


def test_colours_without_a_tag_are_read_as_players_show_them(tmp_path):
    for size, matrix in ((64, "ITU601"), (720, "ITU709")):
        path = tmp_path / f"{size}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt, stream.options = 64, size, "yuv444p", {"crf": "4"}
            frame = av.VideoFrame.from_ndarray(
                np.broadcast_to(np.uint8([200, 40, 90]), (size, 64, 3)).copy(), format="rgb24"
            )
            frame = frame.reformat(format="yuv444p", dst_colorspace=matrix)
            frame.colorspace = 2  # unspecified
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert np.abs(read_video(path, 1, 8, size, 64).astype(int) - [200, 40, 90]).max() <= 4


def test_variable_frame_rate(tmp_path):
    path, times = tmp_path / "vfr.mp4", [0, 10, 20, 500, 520, 1000]  # milliseconds
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(numbered(6), times):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(read_video(path, 4, 4, 32, 32)) == [0, 2, 3, 4]  # 0, 250, 500 and 750 ms
    assert numbers(read_video(path, 5, 4, 32, 32)) == [0, 2, 3, 4, 5]


def test_rotation_is_undone(tmp_path):
    path, picture = tmp_path / "phone.mp4", quadrants(32, 64)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        stream.set_display_rotation(-90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert (probe(path).height, probe(path).width) == (64, 32)
    shown = read_video(path, 3, 8, 64, 32)
    assert np.abs(shown[0].astype(int) - np.rot90(picture, -1)).mean() < 3


def test_wide_pixels_are_made_square(tmp_path):
    path = tmp_path / "dv.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(32, 32), format="rgb24")))
        container.mux(stream.encode())
    # shown 64 wide, so a 32 x 64 cut takes all of it and a square one the middle half
    assert (
        np.abs(
            read_video(path, 1, 8, 32, 64)[0, :, 10].astype(int) - read_video(path, 1, 8, 32, 64)[0, :, 22]
        ).max()
        < 12
    )
    assert np.abs(read_video(path, 1, 8, 32, 64)[0].astype(int) - quadrants(32, 64)).mean() < 6


@pytest.mark.parametrize(
    "size, expected", [((32, 48), (0, 8)), ((48, 32), (8, 0)), ((32, 32), (0, 0)), ((33, 49), (0, 8))]
)
def test_centre_crop_without_resizing_copies_pixels(tmp_path, size, expected):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    write_image(tmp_path / "a.png", picture)
    top, left = expected
    want = min(size)
    assert np.array_equal(
        read_image(tmp_path / "a.png", want, want)[0], picture[top : top + want, left : left + want]
    )


def test_cover_then_crop_is_exact(tmp_path):
    columns = np.repeat(np.arange(16, dtype=np.uint8) * 16, 8)  # 128 wide: 16 bars of 8
    write_image(tmp_path / "a.png", np.broadcast_to(columns[None, :, None], (64, 128, 3)))
    # halved to 32 x 64, of which the middle 32 columns are bars 4 to 11, four columns each
    got = read_image(tmp_path / "a.png", 32, 32)[0]
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    assert [int(v + 8) // 16 for v in np.median(got[16, :, 0].reshape(8, 4), axis=1)] == list(range(4, 12))
    assert np.abs(got[:, ::-1].astype(int) - (240 - got)).max() <= 2  # as far left as right
    up = read_image(tmp_path / "a.png", 128, 256)[0]
    assert up.shape == (128, 256, 3)


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    write_image(tmp_path / "a.png", stripes)
    assert np.abs(read_image(tmp_path / "a.png", 16, 16).astype(int) - 127).max() < 25


def test_image_modes(tmp_path):
    picture = quadrants(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", 24, 16)[0], np.rot90(picture, -1))
    assert (probe(tmp_path / "turned.png").height, probe(tmp_path / "turned.png").width) == (24, 16)

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    over = read_image(tmp_path / "clear.png", 8, 8)[0]
    assert tuple(over[0, 0]) == (10, 20, 30) and tuple(over[7, 0]) == (255, 255, 255)

    Image.fromarray(picture).quantize(8).save(tmp_path / "palette.png")
    assert np.abs(read_image(tmp_path / "palette.png", 16, 24)[0].astype(int) - picture).max() <= 1
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "grey.jpg")
    assert np.all(read_image(tmp_path / "grey.jpg", 8, 8) == 77)
    Image.fromarray(np.full((8, 8), 77 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert np.all(read_image(tmp_path / "deep.png", 8, 8) == 77)
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    assert read_image(tmp_path / "print.jpg", 8, 8).max() < 8


def bad_files(folder, clip) -> dict[str, tuple[str, str]]:
    """Name -> (kind, what its message says)."""
    video, rng = clip.read_bytes(), np.random.default_rng(0)
    write_image(folder / "good.png", rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))
    write_image(folder / "good.jpg", rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))
    (folder / "zero.mp4").touch()
    (folder / "zero.png").touch()
    (folder / "junk.mp4").write_bytes(rng.bytes(4000))
    (folder / "junk.jpg").write_bytes(rng.bytes(4000))
    (folder / "half.mp4").write_bytes(video[: len(video) // 2])
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "half.jpg").write_bytes((folder / "good.jpg").read_bytes()[:1500])
    (folder / "clip.flv").write_bytes(video)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "zero.mp4": ("video", "is empty (0 bytes)"),
        "zero.png": ("image", "is empty (0 bytes)"),
        "junk.mp4": ("video", "cannot be read as a video"),
        "junk.jpg": ("image", "cannot be read as an image"),
        "half.mp4": ("video", ""),
        "half.png": ("image", "truncated"),
        "half.jpg": ("image", "truncated"),
        "clip.flv": ("video", "of a kind that cannot be read (.flv)"),
        "sound.mp4": ("video", "no video stream"),
        "gone.mp4": ("video", "does not exist"),
        "gone.png": ("image", "does not exist"),
    }


def test_bad_files_are_named_in_one_sentence(clip24, tmp_path):
    for name, (kind, says) in bad_files(tmp_path, clip24).items():
        path = tmp_path / name
        with pytest.raises(AptError) as error:
            read_video(path, 9, 8, 32, 32) if kind == "video" else read_image(path, 32, 32)
        one_sentence(error, str(path), says)
        with pytest.raises(AptError) as error:
            check_video(path, 9, 8) if kind == "video" else check_image(path)
        one_sentence(error, str(path), says)


def test_a_clip_too_short(tmp_path):
    write_video(tmp_path / "short.mp4", numbered(4), 8)
    for read in (lambda path: read_video(path, 9, 8, 32, 32), lambda path: check_video(path, 9, 8)):
        with pytest.raises(AptError) as error:
            read(tmp_path / "short.mp4")
        one_sentence(
            error,
            "short.mp4 is 0.50 s long, but 1.13 s (9 frames at 8 fps) are needed: "
            "give a longer clip or lower frames",
        )
    check_video(tmp_path / "short.mp4", 4, 8)
    assert numbers(read_video(tmp_path / "short.mp4", 4, 8, 32, 32)) == [0, 1, 2, 3]


def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, numbered(3), 8)
    before = path.read_bytes()
    for clip, says in (
        (numbered(3)[..., :2], "[3, 32, 32, 2]"),
        (numbered(3) / 255, "float64"),
        (numbered(3)[:0], "[0, "),
        (numbered(3, 31), "even"),
    ):
        with pytest.raises(AptError) as error:
            write_video(path, clip, 8)
        one_sentence(error, "a.mp4", says)
    with pytest.raises(AptError, match="cannot write rgb24"):
        write_video(path, numbered(3), 8, pixel_format="rgb24")
    with pytest.raises(AptError, match="a.avi: videos are written as .mp4"):
        write_video(tmp_path / "a.avi", numbered(3), 8)
    with pytest.raises(AptError, match="a.xyz: no image"):
        write_image(tmp_path / "a.xyz", numbered(1)[0])
    (tmp_path / "file").touch()
    with pytest.raises(AptError, match="could not be written"):
        write_image(tmp_path / "file" / "a.png", numbered(1)[0])
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.mp4", "file"]


def test_kinds_go_by_suffix():
    assert kind_of("A.MP4") == "video" and kind_of("b.JPeG") == "image"
