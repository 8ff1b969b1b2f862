"""Folders of runs: states in the order of their numbers, and one run at a time."""

from pathlib import Path

import pytest

from apt_core.errors import AptError
from trainer.config import load_preset
from trainer.jobs.training import LATENTS, run_precompute
from trainer.machines.distributed import World
from trainer.run.folders import FACTS, STATE, newest_state, resolve, state_name, whole_states
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


def test_two_precomputes_in_one_folder(tmp_path):
    with held(tmp_path / LATENTS, World()):
        with pytest.raises(
            AptError, match="latents is in use by another run .process .*: wait until it ends"
        ):
            run_precompute(load_preset(str(TINY)), None, tmp_path)
    with held(tmp_path / LATENTS, World()):
        pass
