"""A short run in miniature, whose state is then harmed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "distributed"))

from layouts import Files, Layout, run_layout, write_files

from trainer.checkpoints.starting_models import describe_state


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(files, tmp_path_factory) -> Path:
    """The folder of a run of one update, with its state."""
    out = run_layout(files, Layout(settings={"updates": 1}), tmp_path_factory.mktemp("run"))
    describe_state(out / "states", files.base, {"second_time": 0.7, "native": {}}, None)
    return out
