"""The metrics react to what they are for."""

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from trainer.mini import ASSETS
from trainer.mini.clips import draw
from trainer.mini.features import load_features
from trainer.mini.metrics import Reference, coverage, edge_energy, frechet


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    return load_features(ASSETS / "features.safetensors")


def test_frechet_distance_equals_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(want, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("moving", [False, True])
def test_real_clips_score_as_real_and_damage_shows(net, moving):
    count = 120
    reference = Reference(net, draw(100, range(count), moving)[0])
    pixels, scenes = draw(101, range(count), moving)
    real = reference.measure(pixels, scenes)
    blurred = reference.measure(
        ndimage.gaussian_filter(pixels.astype(float), (0, 0, 1, 1, 0)).astype(np.uint8), scenes
    )
    same = reference.measure(pixels[[0] * count], [scenes[0]] * count)
    assert real["structure"] == real["alignment"] == 1.0
    assert real["sharpness"] == pytest.approx(1.0, abs=0.1)
    assert blurred["sharpness"] < 0.6
    assert blurred["fd"] > 2 * real["fd"] and blurred["patch_fd"] > 5 * real["patch_fd"]
    assert same["diversity"] < 0.3 < real["diversity"]
    assert same["fd"] > 2 * real["fd"]


def test_words_are_counted_one_by_one(net):
    reference = Reference(net, draw(100, range(40), True)[0])
    pixels, scenes = draw(101, range(40), True)
    shuffled = reference.measure(pixels, scenes[1:] + scenes[:1])
    assert shuffled["alignment"] < 0.1
    assert 0.05 < shuffled["alignment_color"] < 0.5
    assert {
        "alignment_color",
        "alignment_shape",
        "alignment_background",
        "alignment_direction",
    } <= shuffled.keys()
    assert reference.measure(pixels, None)["structure"] is None


def test_coverage_counts_real_clips_that_have_a_neighbour():
    real = np.arange(20.0)[:, None] * np.ones((1, 2))
    assert coverage(real, real) == 1.0
    assert coverage(real, np.full((20, 2), 1000.0)) == 0.0
    assert coverage(real, real[:10]) == pytest.approx(0.5, abs=0.3)


def test_edges_vanish_in_a_flat_picture():
    assert edge_energy(np.full((2, 1, 48, 48, 3), 90, np.uint8)) == 0


def test_what_cannot_be_known_is_none(net):
    flat = np.full((3, 1, 48, 48, 3), 90, np.uint8)
    one = Reference(net, draw(100, [0], False)[0]).measure(draw(101, [0], False)[0], None)
    assert one["fd"] is None and one["diversity"] is None and np.isfinite(one["patch_fd"])
    assert Reference(net, flat).measure(draw(101, range(3), False)[0], None)["sharpness"] is None


def test_a_distance_is_never_below_zero():
    few = np.random.default_rng(0).normal(size=(4, 32)) * 1e4
    assert frechet(few, few) >= 0 and frechet(few, few[::-1]) >= 0
