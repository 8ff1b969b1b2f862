"""`evaluate`, stopped, and on several processes: what is measured stays, and the result is the same."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import run_workers

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.media_write import write_video
from trainer.evaluate.compare import evaluate
from trainer.evaluate.measured import REQUEST, UNFINISHED, Desk, Record
from trainer.evaluate.models import Wishes, stamp
from trainer.machines.distributed import connect
from trainer.mini import GENERATOR
from trainer.mini.clips import draw

sys.path.append(str(Path(__file__).parents[1] / "evaluate"))
table = import_module("own_networks").table
sys.path.pop()

PROMPTS = ["a red circle", "a blue square moving left", "a green triangle"]
METRICS = "motion,saturation,diversity,fd"


def work(folder: Path, out: Path) -> None:
    options = {
        "prompts": folder / "prompts.txt",
        "data": folder / "real",
        "features": folder / "features.toml",
    }
    made, latents = [], OneStepPipeline.latents

    def counted(self, request, number, text):
        made.append(number)
        return latents(self, request, number, text)

    with connect("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if world.size > 1:
            patch.setattr(OneStepPipeline, "latents", counted)
        wishes = Wishes(count=2, seed=3, frames=5)
        evaluate(
            [Path("mini"), folder / "other.safetensors"], out, wishes, **options, metrics=METRICS, world=world
        )
        if world.size > 1:  # the work is shared, not done by all
            assert made == [world.rank, world.rank + 2, world.rank + 4] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for number, clip in enumerate(draw(3, range(3), True)[0]):
        write_video(folder / "real" / f"{number}.mp4", clip, 8)
    table(folder)
    shutil.copy(GENERATOR, folder / "other.safetensors")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    torch.set_num_threads(1)
    work(folder, folder / "alone")
    return json.loads((folder / "alone" / "evaluation.json").read_text())


def same(one: dict, other: dict) -> None:
    for first, second in zip(one["models"] + [one["real"]], other["models"] + [other["real"]]):
        assert [c["file"] for c in first["clips"]] == [c["file"] for c in second["clips"]]
        for a, b in zip(first["clips"], second["clips"]):
            assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)
        assert first["metrics"].keys() == second["metrics"].keys()
        for name, figure in first["metrics"].items():
            assert figure["value"] == pytest.approx(second["metrics"][name]["value"], rel=1e-6), name


def test_two_processes_share_the_samples_and_find_the_same(folder, alone):
    out = folder / "two"
    run_workers(2, work, folder, out)
    result = json.loads((out / "evaluation.json").read_text())
    assert (alone["processes"], result["processes"]) == (1, 2)
    assert set(alone["models"][0]["metrics"]) == {"motion", "saturation", "diversity", "fd_means"}
    same(alone, result)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (folder / "alone").iterdir())


def test_one_that_was_stopped_goes_on_with_what_is_measured(folder, alone, monkeypatch, capsys):
    out, made, latents = folder / "stopped", [], OneStepPipeline.latents

    def counted(self, request, number, text):
        made.append(number)
        if len(made) == 5:
            raise KeyboardInterrupt
        return latents(self, request, number, text)

    monkeypatch.setattr(OneStepPipeline, "latents", counted)
    with pytest.raises(KeyboardInterrupt):
        work(folder, out)
    assert not (out / "evaluation.json").exists()
    # another request does not take them for its own
    with pytest.raises(AptError, match="holds an unfinished evaluation of other models, files or settings"):
        evaluate([Path("mini")], out, prompts=folder / "prompts.txt")
    capsys.readouterr()
    work(folder, out)
    assert "7 of 15 clips are in" in capsys.readouterr().out  # 3 real ones, 4 samples
    assert made == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2, 3, 4, 5]
    same(alone, json.loads((out / "evaluation.json").read_text()))
    assert not (out / UNFINISHED).exists()
    with pytest.raises(AptError, match="already exists and is not empty"):
        work(folder, out)


def test_a_replaced_checkpoint_is_another_request(folder):
    path = folder / "replaced.safetensors"
    path.write_bytes(b"one")
    before = stamp(path)
    assert before == stamp(path)
    path.write_bytes(b"another")
    assert stamp(path) != before and stamp(folder) != before


def test_a_record_is_read_as_it_was_written_and_a_damaged_one_is_named(tmp_path):
    features = {"fd_x": np.arange(6.0).reshape(2, 3)}
    record = Record({"motion": 0.25, "flicker": None}, features, np.ones((1, 8, 8, 3), np.float32), 1.5, True)
    path = Desk(tmp_path).record("real", 3)
    record.write(path)
    found = Record.read(path)
    assert (found.row, found.seconds, found.first) == (record.row, 1.5, True)
    assert np.array_equal(found.features["fd_x"], features["fd_x"]) and found.small.shape == (1, 8, 8, 3)
    assert Desk(tmp_path).missing("real", 5) == [0, 1, 2, 4]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AptError, match="000003.npz cannot be read .*: remove it, and evaluate goes on."):
        Record.read(path)
    np.savez(path, about=np.array('{"row": {}}'))
    with pytest.raises(AptError, match="000003.npz cannot be read .*: remove it, and evaluate goes on."):
        Record.read(path)


@pytest.mark.parametrize("content", ['{"half', "[]", ""])
def test_a_damaged_request_is_a_sentence(tmp_path, content):
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / REQUEST).write_text(content)
    with pytest.raises(AptError, match="request.json is damaged: remove .*, or give another --out."):
        Desk(tmp_path).open({"models": []})
