"""Curves of a run: one picture a stage, drawn from what the history has."""

import warnings

import numpy as np
import pytest
from PIL import Image

from apt_core.errors import AptError
from trainer.run.monitor import Monitor
from trainer.run.plot import plot_run, read_history


def write(folder, rows):
    with Monitor(folder) as monitor:
        for done, row in enumerate(rows, start=1):
            monitor(done, len(rows), row)


def test_a_picture_for_each_stage_that_was_trained(tmp_path):
    rows = [
        {
            "right_pairs": 0.5 + n / 100,
            "logit_real": n / 10,
            "logit_fake": -n / 10,
            "d_adversarial": 1.4 - n / 50,
            "r1_loss": 0.1,
        }
        for n in range(20)
    ]
    rows[9]["held_right_pairs"] = 0.7
    write(tmp_path / "log" / "image", rows)
    write(tmp_path / "log" / "distill", [{"cd_loss_image": 0.1}, {"cd_loss_video": 0.2}])
    made = plot_run(tmp_path, tmp_path / "pictures")
    assert [path.name for path in made] == ["curves-distill.png", "curves-image.png"]
    history = read_history(tmp_path / "log" / "image" / "history.csv")
    assert history["held_right_pairs"] == ([10], [0.7]) and history["right_pairs"][1][-1] == 0.69
    with Image.open(made[1]) as picture:
        colors = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert {
        (0x00, 0x72, 0xB2),
        (0x00, 0x9E, 0x73),
    } <= colors  # the lines of pairs and of real logits are there


def test_stage_1_shows_what_its_method_logs(tmp_path):
    """Two panels of consistency, or those of dmd: as many as have a line."""
    sizes = []
    for method, row in (
        ("consistency", {"cd_loss_image": 0.1, "cd_loss_final_image": 0.2}),
        ("dmd", {"fake_loss_image": 0.1, "dmd_gap_image": 0.2, "dmd_real_distance_image": 0.3}),
    ):
        write(tmp_path / method / "log" / "distill", [row, row])
        [made] = plot_run(tmp_path / method)
        with Image.open(made) as picture:
            sizes.append(picture.size[1])
    assert sizes[1] == 2 * sizes[0]  # two rows of panels, not one


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(AptError, match="has no training log"):
        plot_run(tmp_path)
    folder = tmp_path / "log" / "image"
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("update,d_loss\nthree,1.0\n")
    with pytest.raises(AptError, match="is damaged, a row cannot be read as numbers"):
        plot_run(tmp_path)


def test_zeros_alone_are_drawn_without_a_warning(tmp_path):
    rows = [{"cd_loss_image": loss, "cd_loss_final_image": 0.0} for loss in (0.2, 0.1)]
    write(tmp_path / "log" / "distill", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, which has no logarithm of them
        assert len(plot_run(tmp_path)) == 1
