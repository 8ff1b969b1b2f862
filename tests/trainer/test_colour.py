"""Light of PQ and HLG, matrices and the tone map against the figures that the standards print."""

import numpy as np
import pytest
from light import code, pq_signal

from apt_core.errors import AptError
from trainer.data.colour import (
    BT2020,
    HLG,
    KNEE,
    P3,
    PEAK,
    PQ,
    WHITE,
    check_colours,
    hlg_light,
    hlg_scene,
    pq_light,
    to_bt709,
    to_sdr,
    tone_map,
)


def test_pq_is_the_standards():
    assert pq_light(np.array([0.0, 1.0])) == pytest.approx([0, 10000])
    for light in (0.005, 1, 100, WHITE, 1000, 4000):
        assert pq_light(np.array([pq_signal(light)]))[0] == pytest.approx(light, rel=1e-9)
    assert pq_light(np.array([0.58069]))[0] == pytest.approx(203, rel=1e-3)  # BT.2408: 58 %


def test_hlg_is_the_standards():
    assert hlg_scene(np.array([0, 0.5, 1])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)
    grey = lambda signal: hlg_light(np.repeat(hlg_scene(np.array([signal])), 3)[None])[0]
    assert grey(1.0) == pytest.approx([1000] * 3, rel=1e-4)
    assert grey(0.75) == pytest.approx([203] * 3, rel=3e-3)  # BT.2408: reference white at 75 %
    red = hlg_light(np.array([[1 / 12, 0, 0]]))[0]
    assert red == pytest.approx([1000 * (0.2627 / 12) ** 0.2 / 12, 0, 0])


def test_the_matrices_are_the_published_ones():
    bt2087 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert np.abs(to_bt709(BT2020) - bt2087).max() < 1e-4
    assert (
        np.abs(to_bt709(P3) - [[1.2249, -0.2249, 0], [-0.0420, 1.0420, 0], [-0.0197, -0.0786, 1.0983]]).max()
        < 1e-3
    )
    for primaries in (1, BT2020, P3):
        assert to_bt709(primaries).sum(1) == pytest.approx(np.ones(3))  # white stays white


def test_the_tone_map_leaves_the_dark_alone_and_ends_at_white():
    x = np.linspace(0, 12, 24001)
    y, top = tone_map(x), PEAK / WHITE
    assert np.array_equal(y[x <= KNEE], x[x <= KNEE]) and (np.diff(y) >= 0).all()
    slope = (np.diff(y) / np.diff(x))[x[1:] < top]
    # no kink: at KNEE it bends by twice 1 / (1 - KNEE) - 1 / (top - KNEE)
    assert np.abs(np.diff(slope)).max() < 2 * 1.78 * 5e-4
    assert tone_map(np.array([top, 2 * top])) == pytest.approx([1, 1]) and tone_map(np.array([1.0]))[
        0
    ] == pytest.approx(0.7652, abs=1e-3)


def test_colours_below_the_knee_arrive_as_they_were():
    bt709 = np.array([[0.4, 0.0, 0.0], [0.1, 0.3, 0.05], [0.25, 0.25, 0.25]])  # over the reference white
    bt2020 = bt709 @ np.linalg.inv(to_bt709(BT2020)).T
    signal = np.vectorize(pq_signal)(WHITE * bt2020)
    got = to_sdr(np.rint(signal * 65535).astype(np.uint16)[None], PQ, BT2020)[0]
    assert got.dtype == np.uint8 and np.abs(got - code(bt709)).max() <= 2  # 0 and a little more differ most
    # HDR that does not say is BT.2020
    assert np.array_equal(to_sdr(np.rint(signal * 65535).astype(np.uint16)[None], PQ, 2)[0], got)


def test_highlights_keep_their_hue_and_what_is_wider_is_clipped():
    light = np.array([[4.0, 2.0, 1.0]])
    signal = np.vectorize(pq_signal)(WHITE * light @ np.linalg.inv(to_bt709(BT2020)).T)
    got = to_sdr(np.rint(signal * 65535).astype(np.uint16)[None], PQ, BT2020)[0, 0]
    assert np.abs(got - code(light[0] / 4 * tone_map(np.array([4.0])))).max() <= 1
    wide = to_sdr(np.uint16([[[0, 65535, 0]]]), 1, BT2020)[0, 0]
    assert wide.tolist() == [0, 255, 0]
    assert to_sdr(np.full((1, 1, 3), 65535, np.uint16), HLG, BT2020)[0, 0].tolist() == [255] * 3


def test_wide_gamuts_of_sdr_are_converted():
    p3 = np.array([0.2, 0.5, 0.3])
    got = to_sdr(np.rint(p3[None, None] ** (1 / 2.4) * 65535).astype(np.uint16), 1, P3)[0, 0]
    assert np.abs(got - code(to_bt709(P3) @ p3)).max() <= 1


@pytest.mark.parametrize(
    "codes, name",
    [
        ((8, 1, 1), "linear light"),
        ((10, 1, 1), "a logarithmic curve"),
        ((1, 11, 1), "DCI-P3"),
        ((16, 9, 15), "IPT (Dolby Vision)"),
        ((16, 9, 10), "BT.2020 of constant luminance"),
    ],
)
def test_colours_that_nothing_converts_are_named(codes, name):
    with pytest.raises(AptError) as error:
        check_colours("a.mov", *codes)
    assert (
        str(error.value)
        == f"a.mov has colours that cannot be converted ({name}): export it in BT.709, PQ or HLG."
    )
    for fine in ((1, 1, 1), (2, 2, 2), (6, 6, 6), (13, 1, 0), (16, 9, 9), (18, 9, 9), (14, 9, 9), (1, 5, 5)):
        check_colours("a.mov", *fine)
