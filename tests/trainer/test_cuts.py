"""Buckets: every file goes to the nearest shape, and what it is cut to has whole patches and the wanted
number of pixels.
"""

import numpy as np
import pytest

from apt_core.errors import AptError
from apt_core.files.media_write import write_image, write_video
from trainer.data.captions import Item, find_items
from trainer.data.cuts import Cut

ASPECTS = ("16:9", "4:3", "1:1", "3:4", "9:16")


def video(path, height, width, frames, fps=8):
    write_video(
        path,
        np.stack([np.full((height, width, 3), 5 * i, np.uint8) for i in range(frames)]),
        fps,
        crf=4,
        pixel_format="yuv444p",
    )
    return Item(path, "video", "a caption")


def test_buckets_have_whole_patches_and_the_same_number_of_pixels():
    for stride, height, width in (((4, 8, 8), 480, 832), ((4, 8, 8), 720, 1280), ((4, 16, 16), 704, 1280)):
        sizes = Cut(height, width, 49, 24, aspects=ASPECTS, stride=stride).sizes("video")
        assert sizes[0] == (height, width) and sizes[2][0] == sizes[2][1] and sizes[4][0] > sizes[4][1]
        for h, w in sizes:
            assert h % (2 * stride[1]) == 0 and w % (2 * stride[2]) == 0
            assert h * w == pytest.approx(height * width, rel=0.06)


def test_a_file_goes_to_the_nearest_bucket(tmp_path):
    cut = Cut(96, 160, 5, 8, aspects=ASPECTS, image_height=128, image_width=128)
    for name, (height, width), aspect in (
        ("wide", (90, 160), 0),
        ("square", (70, 72), 2),
        ("tall", (160, 80), 4),
    ):
        (clip,) = cut.plan(video(tmp_path / f"{name}.mp4", height, width, 6))
        assert (clip.height, clip.width) == cut.sizes("video")[aspect]
        assert cut.read(clip).shape == (5, clip.height, clip.width, 3)
    write_image(tmp_path / "i.png", np.zeros((50, 50, 3), np.uint8))
    (clip,) = cut.plan(Item(tmp_path / "i.png", "image", "x"))
    assert (clip.height, clip.width, clip.frames) == (128, 128, 1)


def test_short_clips_get_fewer_frames_and_long_ones_give_several(tmp_path):
    cut = Cut(32, 32, 9, 8, shorter=(5,), clips_per_file=3)
    lengths = {4: [], 6: [5], 9: [9], 13: [9], 18: [9, 9], 40: [9, 9, 9]}
    for frames, expected in lengths.items():
        item = video(tmp_path / f"{frames}.mp4", 32, 32, frames)
        if not expected:
            with pytest.raises(
                AptError, match=r"is 0.50 s long, but 0.63 s \(5 frames at 8 fps\) are needed"
            ):
                cut.plan(item)
            continue
        clips = cut.plan(item)
        assert [clip.frames for clip in clips] == expected and [clip.number for clip in clips] == list(
            range(len(expected))
        )
        for clip in clips:  # frame k of the file is grey 5 k
            first = round(clip.start * 8)
            assert (
                abs(
                    cut.read(clip)[:, 16, 16].astype(int).mean(1) - 5 * np.arange(first, first + clip.frames)
                ).max()
                <= 2
            )


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"aspects": ("wide",)}, "aspect 'wide' is not width:height: write it like 16:9."),
        ({"aspects": ("0:1",)}, "aspect '0:1' is not width:height"),
        ({"shorter": (6,)}, "frames 6 must be 4 n + 1"),
        ({"shorter": (9,)}, "shorter names 9 frames twice"),
        ({"image_height": 40}, "an image of 32x40 and 1 frames does not fit: height 40"),
    ],
)
def test_impossible_cuts(options, sentence):
    with pytest.raises(AptError) as error:
        Cut(32, 32, 9, 8, **options)
    assert sentence in str(error.value)


def test_a_list_names_what_to_take(tmp_path):
    for name in ("a", "b"):
        video(tmp_path / "clips" / f"{name}.mp4", 32, 32, 5)
    (tmp_path / "some.jsonl").write_text('{"file_name": "clips/b.mp4", "caption": "only this"}\n')
    items, bad = find_items(tmp_path / "some.jsonl")
    assert [(item.path, item.caption) for item in items] == [
        (tmp_path / "clips" / "b.mp4", "only this")
    ] and not bad
