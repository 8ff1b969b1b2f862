"""`evaluate` on what a training leaves: states, decays of their averages, shards; and names that tell models
apart.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, done

from apt_core.engine.pipeline import OneStepPipeline
from trainer.checkpoints.generate import find_source
from trainer.data.shards import ShardDataset
from trainer.evaluate.metrics import CLIP
from trainer.mini import GENERATOR

TINY = str(Path(__file__).parents[1] / "tiny.toml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("states")
    done("precompute", TINY, "--out", out)
    done("distill", TINY, "updates=1", "save_every=1", "--out", out)
    return out


@pytest.fixture(scope="module")
def result(run):
    """The average and the raw weights of one state, against shards."""
    out, state = run / "evaluation", run / "states" / "distill" / "step-000001"
    given = ("--data", run, "--reals", 2, "--metrics", "contrast,saturation", "--out", out)
    done("evaluate", state, "--ema", 0.9, "--ema", 0, *given)
    return json.loads((out / "evaluation.json").read_text())


def test_each_decay_of_a_state_is_a_model(run, result):
    assert [model["label"] for model in result["models"]] == ["step-000001 EMA 0.9", "step-000001 raw"]
    assert [model["ema"] for model in result["models"]] == [0.9, 0]
    assert [(m["phase"], m["updates"], m["series"]) for m in result["models"]] == [
        ("distilled", 1, 0),
        ("distilled", 1, 1),
    ]
    for model in result["models"]:
        source = find_source(run / "states" / "distill", "", model["ema"])
        pipe = OneStepPipeline.from_checkpoint(source, "mini", "mini")
        frames = pipe(result["prompts"], seed=0)[0].frames
        wanted = CLIP["contrast"].of(frames)
        assert model["clips"][0]["metrics"]["contrast"] == pytest.approx(wanted, rel=1e-5)
    first, second = (model["clips"][0]["metrics"]["contrast"] for model in result["models"])
    assert first != second


def test_shards_are_decoded_and_their_captions_are_the_prompts(run, result):
    shards = ShardDataset(run / "latents", "video")
    assert result["real"]["what"] == "real videos, through the VAE"
    assert result["prompts"] == [sample.caption for sample in shards.samples[:2]]
    pipe = OneStepPipeline.from_checkpoint(GENERATOR)
    for number, clip in enumerate(result["real"]["clips"]):
        frames = np.concatenate(list(pipe.frames(shards.get(number)[0][None])))
        for name in ("saturation", "contrast"):
            assert clip["metrics"][name] == pytest.approx(CLIP[name].of(frames), rel=1e-5)


def test_a_decay_that_was_not_kept_is_refused_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr(OneStepPipeline, "embed", None)
    for name, more in (("evaluate", ("--data", run)), ("generate", ("a red circle", "--vae", "mini"))):
        given = (run / "states" / "distill", "--ema", 0.5, *more, "--out", tmp_path / "x")
        answer = command(name, *given)
        assert answer.exit_code == 2 and "has no average of decay 0.5: it has 0.9, and 0" in answer.stderr


def test_shards_of_another_size_or_rate_are_refused(run, tmp_path):
    given = ("evaluate", "mini", "--data", run, "--out", tmp_path / "x")
    assert "give shards of that size." in command(*given, "--frames", 5).stderr
    assert "is at 8 fps and the samples are at 4: give --fps 8." in command(*given, "--fps", 4).stderr


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    from apt_core.files.checkpoint_header import read_metadata
    from trainer.config import Files
    from trainer.evaluate.models import Wishes, open_models, series

    paths = [tmp_path / a / "last" / "apt.safetensors" for a in ("one", "two")]
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copy(GENERATOR, path)
    models = open_models([*paths, Path("mini")], [], Files(), Wishes())
    assert [model.label for model in models] == ["one/last/apt", "two/last/apt", "apt_mini"]
    assert series(models) == [0, 1, 2] and series([models[0], models[0], models[1]]) == [0, 0, 1]
    apt = read_metadata(GENERATOR)
    assert (models[0].phase, models[0].updates) == (apt["phase"], apt["updates"])


def test_reading_a_state_in_a_process_of_its_own_says_nothing_of_torch(run):
    read = (
        "from trainer.checkpoints.trained_models import open_generator as read; import sys; read(sys.argv[1])"
    )
    state = run / "states" / "distill" / "step-000001"
    result = subprocess.run(
        [sys.executable, "-c", read, state], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
