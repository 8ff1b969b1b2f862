"""`evaluate` on clips of the miniature's kind: its judge reads them, and no others."""

import csv
import json
from functools import partial

import commands
import numpy as np
import pytest

from apt_core.engine.pipeline import OneStepPipeline
from trainer.evaluate.metrics import judged
from trainer.mini import GENERATOR
from trainer.mini.clips import draw, words_of
from trainer.mini.judge import read_clip

command = partial(commands.command, "evaluate")


def test_drawn_clips_are_whole_and_show_their_caption_and_no_other():
    pixels, scenes = draw(5, range(12), True)
    found = [judged(clip, scene.caption) for clip, scene in zip(pixels, scenes)]
    assert found == [{"structure": 1.0, "alignment": 1.0}] * 12
    other = [judged(clip, scene.caption) for clip, scene in zip(pixels, scenes[1:] + scenes[:1])]
    wanted = [read_clip(clip).agrees(s)["all"] for clip, s in zip(pixels, scenes[1:] + scenes[:1])]
    assert [row["alignment"] for row in other] == wanted and sum(wanted) < 3
    flipped = judged(pixels[0][::-1], scenes[0].caption)  # it moves the other way
    assert flipped == {"structure": 1.0, "alignment": 0.0}
    assert judged(pixels[0][-1:], scenes[0].caption) == {"structure": 1.0, "alignment": 1.0}
    torn = np.roll(pixels[0], 24, axis=2)
    torn[:, 20:28] = pixels[1][:, 20:28]
    assert judged(torn, scenes[0].caption)["structure"] == 0.0
    assert judged(pixels[0], "a cat") == judged(pixels[0], None) == {"structure": None, "alignment": None}
    assert words_of(scenes[0].caption)["direction"] == scenes[0].direction


def test_evaluate_judges_prompts_of_its_kind(tmp_path):
    prompts = [scene.caption for scene in draw(6, range(4), True)[1]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    run = command("mini", "--prompts", tmp_path / "prompts.txt", "--count", 2, "--out", tmp_path / "out")
    assert run.exit_code == 0, run.output
    (model,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    videos = OneStepPipeline.from_checkpoint(GENERATOR)(prompts, seed=0, count=2)
    wanted = [judged(video.frames, prompts[n // 2]) for n, video in enumerate(videos)]
    for name in ("structure", "alignment"):
        values = [row[name] for row in wanted]
        assert [clip["metrics"][name] for clip in model["clips"]] == values
        assert model["metrics"][name]["value"] == np.mean(values)
    with (tmp_path / "out" / "clips.csv").open(newline="") as file:
        assert [float(row["structure"]) for row in csv.DictReader(file)] == [r["structure"] for r in wanted]


@pytest.mark.parametrize(
    "prompt, size, why",
    [("a red tram", (), "not the prompt 'a red tram'"), (None, ("--height", 64, "--width", 48), "not 48x64")],
)
def test_other_clips_are_not_judged(tmp_path, prompt, size, why):
    prompt = prompt or draw(6, [0], True)[1][0].caption
    (tmp_path / "prompts.txt").write_text(prompt)
    given = ("mini", "--prompts", tmp_path / "prompts.txt", *size, "--out", tmp_path / "out")
    run = command(*given, "--metrics", "structure")
    assert run.exit_code == 2 and run.stderr.count("\n") == 1
    assert "structure is read by the miniature's judge" in run.stderr and why in run.stderr
    assert not (tmp_path / "out").exists()
