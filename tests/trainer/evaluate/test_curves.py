"""The page's curves over updates: where the points lie, which is best, and when there are none."""

import re

import pytest

from trainer.evaluate.curves import HEIGHT, LEFT, WIDTH, best, curves


def model(updates, series=0, ema=0.9, **figures) -> dict:
    metrics = {name: {"value": value, "of_real": None} for name, value in figures.items()}
    about = {"label": f"<{updates}> {series}", "phase": "video", "updates": updates, "ema": ema}
    return about | {"series": series, "metrics": metrics}


def result(*models, **real) -> dict:
    metrics = {name: {"value": value, "of_real": None} for name, value in real.items()}
    return {"models": list(models), "real": {"metrics": metrics} if real else None}


@pytest.mark.parametrize(
    "name, values, real, wanted",
    [
        ("fid", (3.0, 2.0, 2.5), None, 20),  # the lowest distance
        ("fd_net", (3.0, 2.0, 1.5), None, 30),
        ("clip_score", (31.0, 33.0, 32.0), 30.0, 20),  # the highest
        ("structure", (0.5, 0.9, 0.7), None, 20),
        ("sharpness", (50.0, 230.0, 130.0), 100.0, 30),  # nearest by ratio: 0.5, 2.3, 1.3
        ("sharpness", (50.0, 190.0, 201.0), 100.0, 20),
        ("saturation", (0.0, 4.0, 5.0), 1.0, 20),
        ("sharpness", (50.0, 230.0, 130.0), None, None),  # nothing says which
        ("diversity", (1.0, 2.0, 3.0), None, None),
        ("flow", (None, None, None), 1.0, None),
        ("fid", (None, 2.0, 3.0), None, 20),
    ],
)
def test_the_best_is_what_the_metric_says(name, values, real, wanted):
    models = [model(updates, **{name: value}) for updates, value in zip((10, 20, 30), values)]
    found = best(name, models, real)
    assert (found and found["updates"]) == wanted


def test_points_stand_over_their_updates_and_the_best_has_the_ring():
    made = [model(100, sharpness=4.0), model(0, sharpness=1.0), model(50, sharpness=2.5)]
    drawn = curves(result(*made, sharpness=4.2))
    (line,) = re.findall(r'points="([^"]*)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in line.split()]  # by updates, not as given
    (left, low), (middle, half), (right, high) = points
    assert left == LEFT and middle == (left + right) / 2 and right == WIDTH - 8
    assert 0 < high < half < low < HEIGHT and half == pytest.approx((low + high) / 2, abs=0.1)
    assert re.findall(r'class="best" cx="([\d.]+)" cy="([\d.]+)"', drawn) == [(f"{right}", f"{high}")]
    (real,) = re.findall(r'class="real" d="M44 ([\d.]+)', drawn)
    assert float(real) < high
    assert "best &lt;100&gt; 0, 4" in drawn and "<100>" not in drawn
    assert ">0</text>" in drawn and ">100</text>" in drawn


def test_each_series_is_a_line_and_one_model_is_no_curve():
    pair = [model(10, fid=2.0), model(20, fid=1.0)]
    other = [model(updates, 1, 0, fid=3.0) for updates in (10, 20)]
    drawn = curves(result(*pair, *other, model(30, 2, fid=0.5)))
    assert drawn.count("<polyline") == 2 and drawn.count('class="best"') == 1
    assert "video, EMA 0.9</span>" in drawn and "video, raw weights</span>" in drawn
    assert "best &lt;20&gt; 0, 1" in drawn  # what is no curve is not in it
    assert curves(result(model(10, fid=2.0), model(10, 1, fid=1.0))) == ""
    assert curves(result(model(10, fid=2.0), model(10, fid=1.0))) == ""
    assert curves(result(model(10, fid=2.0), model(None, fid=1.0))) == ""
    assert 'class="real"' not in drawn and "polyline" in curves(result(*pair[:1], model(11, fid=2.0)))
