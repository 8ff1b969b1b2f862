"""`evaluate` on the miniature: what it writes, that it is the pipeline's samples that are measured, and its
mistakes in one sentence.
"""

import csv
import json
import re
from functools import partial

import commands
import numpy as np
import pytest
import torch
from own_networks import network, table

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.media_write import write_image, write_video
from trainer.digest import file_digest
from trainer.evaluate import choice
from trainer.evaluate.features import distance
from trainer.evaluate.measured import Measured, measure
from trainer.evaluate.metrics import CLIP, diversity, thumbnail
from trainer.evaluate.page import write_page
from trainer.mini import GENERATOR
from trainer.mini.clips import draw

PROMPTS = ["a red circle", "a blue square moving left </script>"]


command, refused = partial(commands.command, "evaluate"), partial(commands.refused, "evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, and three captioned real clips of the miniature's size."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    pixels, scenes = draw(3, range(3), True)
    (folder / "real").mkdir()
    for number, (clip, scene) in enumerate(zip(pixels, scenes)):
        write_video(folder / "real" / f"{number}.mp4", clip, 8, crf=8, pixel_format="yuv444p")
        (folder / "real" / f"{number}.txt").write_text(scene.caption)
    write_image(folder / "real" / "still.png", pixels[0, 0])
    return folder


@pytest.fixture(scope="module")
def made(folder):
    """Two prompts, two seeds, against the real clips, with a distance in four features."""
    torch.set_num_threads(1)
    out, features = folder / "out", table(folder, patch=24)
    options = ["--prompts", folder / "prompts.txt", "--data", folder / "real", "--features", features]
    result = command("mini", *options, "--count", 2, "--seed", 5, "--out", out)
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "evaluation.json").read_text()), result.output


@pytest.fixture(scope="module")
def piped():
    """The same samples from the pipeline."""
    videos = OneStepPipeline.from_checkpoint(GENERATOR)(PROMPTS, seed=5, count=2)
    return [video.frames for video in videos]


def test_the_figures_are_of_the_pipelines_samples(made, piped, folder):
    _, result, _ = made
    (model,) = result["models"]
    for name, metric in CLIP.items():
        each = [metric.of(clip) for clip in piped]
        assert [clip["metrics"][name] for clip in model["clips"]] == pytest.approx(each, rel=1e-5)
        real = result["real"]["metrics"][name]["value"]
        assert model["metrics"][name]["value"] == pytest.approx(np.mean(each), rel=1e-5)
        assert model["metrics"][name]["of_real"] == pytest.approx(np.mean(each) / real, rel=1e-5)
    small = [thumbnail(clip) for clip in piped]
    assert model["metrics"]["diversity"]["value"] == pytest.approx(
        diversity([small[:2], small[2:]]), rel=1e-5
    )
    assert result["real"]["metrics"]["sharpness"]["of_real"] is None


def test_the_real_clips_are_read_from_their_files(made):
    pixels = draw(3, range(3), True)[0]
    _, result, _ = made
    assert [clip["name"] for clip in result["real"]["clips"]] == ["0.mp4", "1.mp4", "2.mp4"]
    for name in ("motion", "saturation", "contrast"):
        wanted = np.mean([CLIP[name].of(clip) for clip in pixels])
        assert result["real"]["metrics"][name]["value"] == pytest.approx(wanted, rel=0.02)  # H.264 at crf 8


def test_the_distances_are_those_of_the_features(made, piped, folder):
    from trainer.data.media import read_video

    _, result, _ = made
    real = [read_video(folder / "real" / f"{n}.mp4", 9, 8, 48, 48) for n in range(3)]
    net = network(folder, patch=24)
    for name in ("fd_means", "fd_patch_means"):
        wanted = distance([net(clip)[name] for clip in real], [net(clip)[name] for clip in piped])
        assert result["models"][0]["metrics"][name]["value"] == pytest.approx(wanted, rel=1e-4)
        assert name not in result["real"]["metrics"]


def test_the_result_says_what_it_was_made_from(made, folder):
    out, result, shown = made
    assert result["prompts"] == PROMPTS and (result["seed"], result["count"]) == (5, 2)
    assert result["size"] == {"height": 48, "width": 48, "frames": 9, "fps": 8.0}
    (model,) = result["models"]
    assert (model["label"], model["ema"], model["steps"]) == ("apt_mini", None, 1)
    assert model["weights"]["checkpoint"] == {"name": GENERATOR.name, "sha256": file_digest(GENERATOR)}
    assert set(model["weights"]) == {"checkpoint", "vae", "text_encoder"}
    assert result["features"][0]["sha256"] == file_digest(folder / "means.pt")
    assert result["versions"]["torch"] == torch.__version__
    assert 0 < model["seconds_each"] < 60
    assert "sharpness" in shown and str(out / "evaluation.html") in shown.replace("\n", "")


def test_the_tables_hold_the_same(made):
    out, result, _ = made
    with (out / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["apt_mini", "real"]
    for name, figure in result["models"][0]["metrics"].items():
        assert float(rows[0][name]) == figure["value"]
    with (out / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows[:4]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert len(rows) == 7 and all((out / row["file"]).is_file() for row in rows)
    assert float(rows[2]["motion"]) == result["models"][0]["clips"][2]["metrics"]["motion"]


def test_the_page_holds_all_that_it_shows(made):
    page = (made[0] / "evaluation.html").read_text()
    assert page.count('<video src="data:video/mp4;base64,') == page.count("<video") == 4
    assert page.count("</script>") == 1  # a prompt ends nothing
    assert "a blue square moving left &lt;/script&gt; (2 of 2)" in page
    assert not re.search(r"https?://|@@", page)


def test_a_page_of_too_much_plays_the_files_beside_it(made, tmp_path):
    out, result, _ = made
    write_page(out / "linked.html", result, limit=100)
    page = (out / "linked.html").read_text()
    (out / "linked.html").unlink()
    sources = re.findall(r'<video src="([^"]+)"', page)
    assert len(sources) == 4 and all((out / source).is_file() for source in sources)
    assert "The clips are in the folder clips" in page


def test_captions_are_the_prompts_where_none_are_given_and_several_models_are_columns(folder, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(GENERATOR.read_bytes())
    options = ("--data", folder / "real", "--reals", 2, "--metrics", "motion, contrast", "--out")
    assert command("mini", other, *options, tmp_path / "out").exit_code == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    first, second = result["models"]
    assert (first["label"], second["label"]) == ("apt_mini", "other")
    assert first["metrics"] == second["metrics"] and set(first["metrics"]) == {"motion", "contrast"}
    assert result["prompts"] == [scene.caption for scene in draw(3, range(2), True)[1]]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("<figcaption>real</figcaption>") == 2


def test_a_set_is_the_same_in_any_order_of_its_clips():
    records = [measure(clip, list(CLIP), []) for clip in draw(0, range(4), True)[0]]
    one, other = Measured(records), Measured(records[::-1])
    for name in CLIP:
        assert one.mean(name) == pytest.approx(other.mean(name), rel=1e-12)


def test_mistakes_are_one_sentence(folder, tmp_path):
    prompts, real, features = folder / "prompts.txt", folder / "real", folder / "features.toml"
    out = ("--out", tmp_path / "x")
    assert "there is no prompt: give --prompts FILE, or --data with captions." == refused("mini", *out)
    (tmp_path / "bare").mkdir()
    write_video(tmp_path / "bare" / "0.mp4", draw(0, [0], True)[0][0], 8)
    assert "has no captions: give --prompts FILE." in refused("mini", "--data", tmp_path / "bare", *out)
    (tmp_path / "empty").mkdir()
    given = ("mini", "--prompts", prompts)
    assert "has no video in it: give a folder of videos" in refused(
        *given, "--data", tmp_path / "empty", *out
    )
    assert "is not a folder: give a folder of videos" in refused(*given, "--data", tmp_path / "none", *out)
    assert "there is no metric 'is': use some of sharpness, " in refused(*given, "--metrics", "is", *out)
    assert "fvd needs the weights that it is defined by, i3d_torchscript.pt (SHA-256 bec65" in refused(
        *given, "--metrics", "fvd", *out
    )
    assert "fd needs --features FILE.toml" in refused(*given, "--metrics", "fd", *out)
    assert "fd compares with real clips: add --data" in refused(*given, "--features", features, *out)
    assert "--reals 3 is a number of real clips, but there are none" in refused(*given, "--reals", 3, *out)
    assert "already exists and is not empty" in refused(*given, "--out", folder)
    assert "--ema 0.5 selects an average of a training state" in refused(*given, "--ema", 0.5, *out)
    assert "(apt_mini) is given twice: give each model once." in refused(
        "mini", "mini", "--prompts", prompts, *out
    )
    # a base model says other sizes in its metadata, or none
    base = GENERATOR.parents[1] / "transformer.safetensors"
    said = refused("mini", base, "--prompts", prompts, *out)
    assert (
        "makes 48x48, 9 frames at 8 fps and " in said and "give --height, --width, --frames and --fps" in said
    )
    # one frame a sample, four features: five vectors are needed
    still = ("--frames", 1, "--data", real, "--features", table(tmp_path))
    said = refused("mini", "--prompts", prompts, *still, *out)
    assert "fd_means needs 5 feature vectors of the real clips" in said and "but there would be 1:" in said
    assert not (tmp_path / "x").exists()


def test_flow_without_opencv_says_what_to_install(monkeypatch):
    names = [name for name in choice.NAMES if name != "flow"]
    monkeypatch.setattr(choice, "NAMES", names)
    with pytest.raises(AptError, match="flow needs OpenCV: pip install opencv-python-headless, or leave"):
        choice.chosen("motion,flow", None)
    assert choice.chosen(None, None) == [
        name for name in names if name not in ("fd", "clip_score", *choice.DISTANCES, *choice.JUDGED)
    ]


def test_pictures_have_no_figures_of_time(folder, tmp_path):
    out = tmp_path / "out"
    given = ("--prompts", folder / "prompts.txt", "--data", folder / "real", "--frames", 1, "--out", out)
    assert command("mini", *given).exit_code == 0
    result = json.loads((out / "evaluation.json").read_text())
    figures = result["models"][0]["metrics"]
    assert [name for name, figure in figures.items() if figure["value"] is None] == [
        "flicker",
        "motion",
        "first_frame",
        *(["flow"] if "flow" in CLIP else []),
        "diversity",
    ]
    (real,) = result["real"]["clips"]
    still = draw(3, [0], True)[0][0][:1]
    assert real["name"] == "still.png" and result["real"]["what"] == "real pictures"
    assert real["metrics"]["sharpness"] == pytest.approx(CLIP["sharpness"].of(still))
    page = (out / "evaluation.html").read_text()
    assert (
        page.count('<img src="data:image/png;base64,') == 2 and "2 prompts, seed 0; 48x48, pictures." in page
    )
