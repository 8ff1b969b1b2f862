"""Figures of a clip: each against a value that follows from its definition, and which of them move when real
clips are blurred, frozen, over-saturated or shuffled.
"""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from trainer.evaluate.metrics import (
    CLIP,
    LUMA,
    coarse,
    contrast,
    diversity,
    first_frame,
    flicker,
    flow,
    luma,
    motion,
    saturation,
    sharpness,
    thumbnail,
)
from trainer.mini.clips import draw


def grey(levels) -> np.ndarray:
    """`[F, H, W]` levels as a clip."""
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, -1)


def test_luma_is_bt_709s():
    clip = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]], np.uint8)
    assert np.allclose(luma(clip)[0, 0], 255 * np.array([0.2126, 0.7152, 0.0722]), atol=1e-4)


def test_coarse_gives_the_means_of_areas_of_any_size():
    x = np.arange(35.0).reshape(1, 5, 7)
    assert np.array_equal(coarse(x, 10), x)
    assert np.allclose(coarse(x, 1), x.mean())
    # round(5 / 2) = 2 rows and then 3; round(7 / 2) = 4 columns and then 3
    wanted = [[x[0, :2, :4].mean(), x[0, :2, 4:].mean()], [x[0, 2:, :4].mean(), x[0, 2:, 4:].mean()]]
    assert np.allclose(coarse(x, 2)[0], wanted)


def test_sharpness_of_a_point():
    levels = np.zeros((2, 7, 7))
    levels[:, 3, 3] = 100
    # -400 at the point and 100 at its 4 neighbours, among 5 x 5 pixels with neighbours on all sides
    assert sharpness(grey(levels)) == pytest.approx((400**2 + 4 * 100**2) / 25, rel=1e-5)


def test_flicker_of_alternating_frames_is_their_distance_and_of_a_ramp_zero():
    levels = np.full((6, 20, 20), 80)
    levels[1::2] = 92
    assert flicker(grey(levels)) == pytest.approx(12, rel=1e-5)
    ramp = 10 * np.arange(6)[:, None, None] + np.zeros((6, 20, 20))
    assert flicker(grey(ramp)) == pytest.approx(0, abs=1e-4)
    assert flicker(grey(ramp[:2])) is None


def test_motion_of_a_moving_gradient_grows_with_its_speed():
    """b = 4 x + s t over W columns and F frames: variances 16 (W^2 - 1) / 12 and s^2 (F^2 - 1) / 12."""
    x, t = np.arange(16), np.arange(5)
    for speed in (1, 3, 6):
        clip = grey(4 * x[None, None] + speed * t[:, None, None] + np.zeros((5, 8, 16)))
        still, moving = 16 * (16**2 - 1) / 12, speed**2 * (5**2 - 1) / 12
        assert motion(clip) == pytest.approx(np.sqrt(moving / (still + moving)), rel=1e-4)
    assert motion(grey(np.full((3, 4, 4), 9))) == 0 and motion(grey(np.zeros((1, 4, 4)))) is None


def test_first_frame_of_a_negative_is_minus_one():
    first = np.arange(0, 256, 4).reshape(1, 8, 8)
    assert first_frame(grey(np.concatenate([first, 252 - first]))) == pytest.approx(-1)
    assert first_frame(grey(np.concatenate([first, first // 2, 252 - first]))) == pytest.approx(0, abs=1e-3)
    assert first_frame(grey(first)) is None
    assert first_frame(grey(np.full((3, 8, 8), 7))) is None


def test_saturation_and_contrast_of_two_colours():
    clip = np.zeros((1, 2, 2, 3), np.uint8)
    clip[0, 0], clip[0, 1] = (200, 50, 100), (90, 90, 90)
    assert saturation(clip) == pytest.approx((150 / 255 + 0) / 2)
    apart = (np.array([200, 50, 100]) - 90) @ LUMA
    assert contrast(clip) == pytest.approx(abs(apart) / 2, rel=1e-5)


def test_diversity_is_the_distance_of_the_seeds_of_one_prompt():
    a, b, c = (thumbnail(np.full((2, 32, 32, 3), level, np.uint8)) for level in (10, 20, 50))
    assert diversity([[a, b]]) == pytest.approx(10)
    assert diversity([[a, b, c]]) == pytest.approx((10 + 30 + 40) / 3)
    assert diversity([[a, a], [a, c]]) == pytest.approx((0 + 40) / 2)  # prompts are not compared
    assert diversity([[a], [c]]) is None


def test_flow_is_the_speed_of_a_moving_texture_and_not_of_light():
    pytest.importorskip("cv2", reason="flow needs the extra evaluate")
    wide = uniform_filter(np.random.default_rng(0).uniform(0, 255, (96, 140)), 5)
    wide = (wide - wide.min()) / np.ptp(wide) * 200
    for speed in (0, 1, 3):  # of 96 pixels
        clip = grey([wide[:, speed * t : speed * t + 96] for t in range(5)])
        assert flow(clip) == pytest.approx(100 * speed / 96, rel=0.02, abs=1e-6)
    lighter = grey([wide[:, :96] + 10 * t for t in range(5)])
    assert flow(lighter) < 0.05 and motion(lighter) > 0.2
    assert flow(lighter[:1]) is None and flow(lighter[:, :12]) is None


CLIPS = draw(7, range(8), True)[0]


def saturated(clip: np.ndarray) -> np.ndarray:
    """Colours half as far again from grey of the same brightness."""
    gray = luma(clip)[..., None]
    return np.clip(gray + 1.5 * (clip - gray), 0, 255).round().astype(np.uint8)


def shuffled(clip: np.ndarray) -> np.ndarray:
    """The first frame stays, the others come in another order."""
    return clip[[0, *(1 + np.random.default_rng(0).permutation(len(clip) - 1))]]


def means(clips) -> dict[str, float]:
    return {name: float(np.mean([metric.of(clip) for clip in clips])) for name, metric in CLIP.items()}


@pytest.mark.parametrize(
    "change, moved",
    [
        # A box of 3 takes more than half of the edge energy of stripes and outlines.
        (lambda clip: uniform_filter(clip, (1, 3, 3, 1)), {"sharpness": (0.0, 0.5)}),
        # One frame is all of it: no change, and so no motion and no flicker; each frame is the first.
        (
            lambda clip: np.repeat(clip[4:5], len(clip), 0),
            {"motion": (0.0, 0.0), "flow": (0.0, 0.0), "flicker": (0.0, 0.0), "first_frame": (1.3, 2.0)},
        ),
        # Chroma is 1.5 times as much, less what is clipped.
        (saturated, {"saturation": (1.3, 1.5)}),
        # Neighbours in time are no neighbours any more.
        (shuffled, {"flicker": (3.0, 10.0), "flow": (1.5, 5.0)}),
    ],
    ids=["blurred", "frozen", "saturated", "shuffled"],
)
def test_a_fault_moves_its_metric_and_no_other_much(change, moved):
    """Much: by more than 15% of the real clips' figure."""
    real, copy = means(CLIPS), means([change(clip) for clip in CLIPS])
    for name in CLIP:
        low, high = moved.get(name, (0.85, 1.15))
        assert low <= copy[name] / real[name] <= high, (name, copy[name] / real[name])


def test_what_does_not_ask_for_order_or_colour_does_not_see_it():
    real, other = means(CLIPS), means([shuffled(clip) for clip in CLIPS])
    for name in ("sharpness", "motion", "first_frame", "saturation", "contrast"):
        assert other[name] == pytest.approx(real[name], rel=1e-5)
