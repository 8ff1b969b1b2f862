"""Whatever is changed in a header, in the JSON files of runs, shards and folders or in a state's index: it
loads, or AptError says in one sentence why not. Never another exception.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_core.errors import AptError
from apt_core.files.folders import weight_files
from apt_core.files.tensorfile import read_header
from apt_core.loading.sources import (
    SHIPPED,
    read_text_source,
    read_tiny_source,
    read_transformer,
    read_vae_source,
)
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.starting_models import read_about
from trainer.data.shards import INDEX, ShardDataset
from trainer.run.state_files import StateReader, read_facts

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(QUICK, max_examples=1250)
HEADER = {
    "__metadata__": {"apt": '{"format": 1, "kind": "base"}', "config": '{"transformer": {"num_heads": 2}}'},
    "head.modulation": {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]},
    "blocks.0.self_attn.q.weight": {"dtype": "F16", "shape": [2, 2], "data_offsets": [16, 24]},
    "patch_embedding.weight": {"dtype": "BF16", "shape": [2, 1, 1, 1, 1], "data_offsets": [24, 28]},
}
ABOUT = {"base": str(SHIPPED["base"]), "metadata": {"second_time": 0.7}, "lora": [3, 3.0]}
FACTS = {
    "identity": {"ema_decay": 0.5, "phase": "image"},
    "update": 1,
    "steps": {"generator": 1},
    "rows": [{"update": 1}],
    "files": {".metadata": "00", "__0_0.distcp": "11"},
}
APT = {
    "format": 1,
    "kind": "generator",
    "second_time": 0.7,
    "native": {"width": 48, "height": 48, "frames": 9, "fps": 8},
}
SHARDS = {
    "format": "apt-shards",
    "version": 1,
    "vae": {"stride": [4, 8, 8], "channels": 16},
    "text": {"dim": 96, "length": 32},
    "fps": 8,
    "settings": {},
    "fingerprint": "00",
    "samples": [
        {
            "id": "a",
            "kind": "image",
            "caption": "a",
            "stamp": "1",
            "shard": "s",
            "row": 0,
            "bucket": [16, 1, 6, 6],
        }
    ],
}
WEIGHT_MAP = {"metadata": {"total_size": 4}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -1, 10**30, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "a\0b", "\ud800", "mini", "9" * 5000])
    | st.lists(st.integers(), max_size=4)
    | st.dictionaries(st.text(max_size=4), st.integers(), max_size=2)
)


def places(value, at=()) -> list[tuple]:
    """The way to every value in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@st.composite
def changed(draw, good: dict) -> bytes:
    """The JSON text of `good` with one to three values replaced or gone, or bytes of it harmed."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(value) if place] or [("new",)]))
        inner = value
        for key in way:
            inner = inner[key]
        if draw(st.booleans()) or last == "new":
            inner[last] = draw(VALUES)
        else:
            del inner[last]
    text = bytearray(json.dumps(value).encode())
    if draw(st.integers(0, 3)) == 0 and text:
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text)


def one_sentence(read: Callable, *arguments) -> None:
    try:
        read(*arguments)
    except AptError as error:
        assert str(error).isprintable() and len(str(error)) < 1100


def every_header(place: Path, text: bytes) -> None:
    path = place / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    for read in (read_header, inspect, read_transformer, read_vae_source, read_tiny_source):
        one_sentence(read, path)
    one_sentence(read_text_source, path, None)


def every_about(place: Path, text: bytes) -> None:
    (place / "about.json").write_bytes(text)
    one_sentence(read_about, place)


def every_facts(place: Path, text: bytes) -> None:
    (place / "run.json").write_bytes(text)
    (place / ".metadata").write_bytes(b"")
    one_sentence(read_facts, place, "take another")
    one_sentence(inspect, place)


def every_apt(place: Path, text: bytes) -> None:
    folder = place / "transformer"
    folder.mkdir(exist_ok=True)
    (place / "apt.json").write_bytes(text)
    one_sentence(inspect, place)
    one_sentence(read_transformer, place)


def every_index(place: Path, text: bytes) -> None:
    (place / INDEX).write_bytes(text)
    one_sentence(ShardDataset, place, "image")
    one_sentence(inspect, place)


def every_map(place: Path, text: bytes) -> None:
    (place / "diffusion_pytorch_model.safetensors.index.json").write_bytes(text)
    one_sentence(weight_files, place)


CASES = {
    "header": (HEADER, every_header),
    "about.json": (ABOUT, every_about),
    "run.json": (FACTS, every_facts),
    "apt.json": (APT, every_apt),
    "index.json": (SHARDS, every_index),
    "weights' index": (WEIGHT_MAP, every_map),
}


def attempt(how: settings, strategy, check: Callable, place: Path) -> None:
    @how
    @given(strategy)
    def cases(text: bytes) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        check(place, text)

    cases()


@pytest.mark.parametrize("name", CASES)
def test_a_changed_file_loads_or_is_refused(name, tmp_path):
    good, check = CASES[name]
    attempt(QUICK, changed(good), check, tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_changed_file_loads_or_is_refused_in_thousands(name, tmp_path):
    good, check = CASES[name]
    attempt(settings(MANY, derandomize=False), changed(good), check, tmp_path / "x")


@st.composite
def harmed(draw, good: bytes) -> bytes:
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(raw) - 1))
        what = draw(st.sampled_from(["byte", "cut", "insert"]))
        if what == "byte":
            raw[place] = draw(st.integers(0, 255))
        elif what == "cut":
            del raw[place : place + draw(st.integers(1, 9))]
        else:
            raw[place:place] = draw(st.binary(max_size=9))
        raw = raw or bytearray(b"x")
    return bytes(raw)


def index_of(place: Path) -> bytes:
    """The index of a small state of torch.distributed.checkpoint, whose data lies in `place`."""
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save(
        {"generator": {"weights": torch.ones(3, 4), "more": torch.zeros(2)}},
        checkpoint_id=place,
        no_dist=True,
    )
    return (place / ".metadata").read_bytes()


@pytest.mark.parametrize(
    "how", [QUICK, pytest.param(settings(MANY, max_examples=2500), marks=pytest.mark.slow)]
)
def test_a_changed_index_of_a_state_is_read_or_refused(how, tmp_path):
    good = index_of(tmp_path / "state")
    reader = StateReader(tmp_path / "state")
    assert set(reader.read_metadata().state_dict_metadata) == {"generator.weights", "generator.more"}

    def check(_, text: bytes) -> None:
        (tmp_path / "state" / ".metadata").write_bytes(text)
        one_sentence(StateReader(tmp_path / "state").read_metadata)

    attempt(how, harmed(good), check, tmp_path / "x")
