"""The drawn clips and the judge that reads them back: the judge must be right on real clips and see what is
broken.
"""

import numpy as np
import pytest
from scipy import ndimage

from trainer.mini.clips import COLOR_NAMES, DIRECTIONS, SHAPES, SIZE, draw, scene, shape_distance
from trainer.mini.judge import read_clip


@pytest.mark.parametrize("moving", [False, True])
def test_the_judge_reads_every_real_clip_right(moving):
    clips, scenes = draw(5, range(150), moving)
    for clip, item in zip(clips, scenes):
        reading = read_clip(clip)
        assert reading.structure, item.caption
        assert all(reading.agrees(item).values()), (item.caption, reading)


def test_a_scene_is_a_function_of_seed_and_index_alone():
    together, _ = draw(3, range(8), True)
    alone, _ = draw(3, [5], True)
    assert np.array_equal(together[5], alone[0])
    assert scene(3, 5, True) != scene(4, 5, True)


def test_captions_name_what_is_drawn():
    seen = set()
    for i in range(300):
        item = scene(0, i, True)
        seen.add((item.color, item.shape, item.background, item.direction))
        assert (
            item.caption
            == f"a {item.color} {item.shape} moving {item.direction} on a {item.background} background"
        )
        assert item.color != item.background
    assert (
        {s[0] for s in seen} == set(COLOR_NAMES)
        and {s[1] for s in seen} == set(SHAPES)
        and {s[3] for s in seen} == set(DIRECTIONS)
    )


def test_shapes_have_equal_areas():
    y, x = np.mgrid[-300:300, -300:300] / 10.0
    areas = [(shape_distance(shape, x, y, 10.0) < 0).mean() * 60 * 60 for shape in SHAPES]
    assert areas == pytest.approx([np.pi * 100] * 3, rel=0.01)


def test_noise_cut_objects_and_two_objects_are_broken():
    clips, _ = draw(6, range(40), False)
    rng = np.random.default_rng(0)
    noisy = (clips + rng.normal(0, 60, clips.shape)).clip(0, 255).astype(np.uint8)
    assert np.mean([read_clip(clip).structure for clip in noisy]) < 0.1
    torn = clips.copy()
    torn[:, :, :, SIZE // 2 :] = np.roll(clips, 12, axis=2)[:, :, :, SIZE // 2 :]
    assert np.mean([read_clip(clip).structure for clip in torn]) < 0.75


def test_a_clip_whose_object_changes_or_jumps_is_broken():
    clips, _ = draw(7, range(40), True)
    mixed = clips.copy()
    mixed[:, 5:] = np.roll(clips, 1, axis=0)[:, 5:]
    assert np.mean([read_clip(clip).structure for clip in mixed]) < 0.05
    assert not any(read_clip(clip[[0] * 9]).direction for clip in clips)
    backwards = [read_clip(clip[::-1]).direction for clip in clips]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert backwards == [opposite[read_clip(clip).direction] for clip in clips]


def test_blur_keeps_the_words():
    clips, scenes = draw(8, range(60), False)
    blurred = ndimage.gaussian_filter(clips.astype(float), (0, 0, 1, 1, 0)).astype(np.uint8)
    assert np.mean([read_clip(c).agrees(s)["all"] for c, s in zip(blurred, scenes)]) > 0.9
