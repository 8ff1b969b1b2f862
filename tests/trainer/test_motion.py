"""Motion through a whole phase: in the log, in the picture, and true travel where clips are drawn."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.config import load_preset
from trainer.jobs.training import _measures
from trainer.machines.distributed import World
from trainer.mini.clips import is_drawn, scene
from trainer.run.plot import ADVERSARIAL, plot_run, read_history

TINY = str(Path(__file__).parent / "tiny.toml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("moving")
    settings = [
        "data.images=0",
        "data.clips=10",
        "updates=3",
        "watch_every=1",
        "save_every=3",
        "lr_generator=3e-3",
    ]
    arguments = ["adversarial", TINY, "--phase", "video", *settings, "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_every_look_measures_motion_and_every_third_travel(run):
    out, shown = run
    history = read_history(out / "log" / "video" / "history.csv")
    assert history["motion_of_real"][0] == history["motion_of_start"][0] == [1, 2, 3]
    assert history["travel_of_real"][0] == history["travel_of_start"][0] == [3]
    real, start = history["motion_of_real"][1], history["motion_of_start"][1]
    assert 0 < real[0] < 3 and len(set(real)) == 3
    # the same generator before its first update, whatever it does later
    assert all(a / b == pytest.approx(real[0] / start[0]) for a, b in zip(real, start))
    words = shown.split()
    assert "motion" in words and "travel" in words and "judged" in words
    assert history["judged_motion"][0] == [3]


def test_the_curves_have_a_panel_of_motion(run):
    out, _ = run
    columns = {line.column for panel in ADVERSARIAL for line in panel.lines}
    assert {"motion_of_real", "motion_of_start", "travel_of_real", "travel_of_start", "judged"} <= columns
    assert plot_run(out)[0].stat().st_size > 20_000


def test_travel_is_measured_on_drawn_clips_alone(monkeypatch):
    assert all(is_drawn(scene(0, i, moving).caption) for i in range(50) for moving in (False, True))
    assert not is_drawn("a red tram moving left on a green background") and not is_drawn("")

    def names(kind, *captions, preset="mini", watch_every=10, held=(0,)):
        samples = [SimpleNamespace(caption=caption) for caption in captions]
        plan = SimpleNamespace(
            kind=kind, preset=load_preset(preset, (f"watch_every={watch_every}",), ("train",))
        )
        datasets = {"video": SimpleNamespace(samples=samples)}
        batches = SimpleNamespace(datasets=datasets, held={"video": list(held)})
        return set(_measures(plan, batches, World()))

    drawn = scene(0, 0, True).caption
    assert names("video", drawn) == {"motion", "travel"} and names("image", drawn) == set()
    assert names("video", drawn, "a tram in the rain") == {"motion"}
    assert names("video", drawn, preset="wan2.1-1.3b-480p") == {"motion"}
    monkeypatch.setattr("trainer.jobs.training.open_vae", lambda files: pytest.fail("a VAE was opened"))
    assert names("video", drawn, watch_every=0) == set() == names("video", drawn, held=())
