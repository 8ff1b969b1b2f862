"""Folders of runs: states in the order of their numbers, and one run at a time."""

from pathlib import Path

import pytest

from apt_core.errors import AptError
from trainer.config import load_preset
from trainer.jobs.training import LATENTS, run_precompute
from trainer.machines.distributed import World
from trainer.run.folders import (
    DISTILLED,
    FACTS,
    IMAGE,
    STATE,
    earlier_note,
    newest_state,
    resolve,
    state_name,
    whole_states,
)
from trainer.run.lock import held

TINY = Path(__file__).parent / "tiny.toml"


def test_states_are_in_the_order_of_their_numbers(tmp_path):
    numbers = [(9, 0), (999999, 0), (999999, 1), (999999, 2), (999999, 10), (1000000, 0), (1000000, 1)]
    names = [state_name(*pair) for pair in numbers]
    assert names[:4] == ["step-000009", "step-999999", "step-999999-half", "step-999999-half2"]
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / FACTS).touch(), (tmp_path / name / STATE).touch()
    assert [path.name for path in whole_states(tmp_path)] == names
    assert newest_state(tmp_path).name == resolve(tmp_path).name == "step-1000000-half"
    (tmp_path / "none").mkdir()
    assert newest_state(tmp_path / "none") is None


def test_what_stands_for_a_run_is_said_until_its_video_phase_has_finished(tmp_path):
    assert earlier_note(tmp_path) == earlier_note(tmp_path / "gone") == ""
    (tmp_path / DISTILLED).touch()
    stage_1 = (
        f"{tmp_path} has finished stage 1 only: distilled.safetensors is taken, and stage 2 is what makes it "
        "sharp."
    )
    assert earlier_note(tmp_path) == earlier_note(tmp_path, images=True) == stage_1
    (tmp_path / IMAGE).touch(), (tmp_path / "apt-image-ema0.5.safetensors").touch()
    assert earlier_note(tmp_path) == (
        f"{tmp_path} has finished no video phase, which makes clips: apt-image.safetensors is taken, and "
        "makes images."
    )
    state = tmp_path / "states" / "image" / state_name(2, 0)
    state.mkdir(parents=True), (state / FACTS).touch(), (state / STATE).touch()
    asked = (state, state.parent, tmp_path / IMAGE)
    assert [earlier_note(path) for path in asked] == [""] * 3 and earlier_note(tmp_path, images=True) == ""
    (tmp_path / "apt-tiny.safetensors").touch()
    assert earlier_note(tmp_path) == ""


def test_two_precomputes_in_one_folder(tmp_path):
    with held(tmp_path / LATENTS, World()):
        with pytest.raises(
            AptError, match="latents is in use by another run .process .*: wait until it ends"
        ):
            run_precompute(load_preset(str(TINY)), None, tmp_path)
    with held(tmp_path / LATENTS, World()):
        pass
