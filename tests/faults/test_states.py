"""Training states that somebody tampered with, or that a disk has spoilt: nothing in them is run, and nobody
trains on with other numbers.
"""

import copyreg
import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts import Layout, run_layout, start_workers, state_of, train_adversarial
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta

from apt_core.errors import AptError
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.starting_models import describe_state
from trainer.checkpoints.trained_models import open_discriminator, open_generator
from trainer.digest import file_digest
from trainer.machines.distributed import World
from trainer.run.folders import resolve, unfinished_states, whole_states
from trainer.run.state import Checkpoints, Keep
from trainer.run.state_files import StateReader, check_digests

ROOT = Path(__file__).parents[2]
TWO = Layout(settings={"updates": 2})


class Payload:
    """Unpickled by anybody who does not look, it makes a folder."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def state(run: Path) -> Path:
    return run / "states" / "step-000001"


def forget_digests(run: Path) -> None:
    """As whoever tampers with a state would, and as states from before them are."""
    path = state(run) / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts.pop("files")
    path.write_text(json.dumps(facts), encoding="utf-8")


def plain_index(path: Path):
    return FileSystemReader(path).read_metadata()


def in_the_index(run: Path, place: Path) -> None:
    index = plain_index(state(run))
    index.planner_data = Payload(place)
    (state(run) / ".metadata").write_bytes(pickle.dumps(index))


def in_bytes(run: Path, place: Path) -> None:
    """An entry that torch.distributed.checkpoint reads with torch.load(weights_only=False)."""
    path = state(run)
    index = plain_index(path)
    name = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[name] = BytesStorageMetadata()
    where = next(key for key in index.storage_data if key.fqn == name)
    info = index.storage_data.pop(where)
    torch.save(Payload(place), path / "__9_0.distcp")
    info.relative_path, info.offset, info.length = "__9_0.distcp", 0, (path / "__9_0.distcp").stat().st_size
    index.storage_data[type(where)(name)] = info
    (path / ".metadata").write_bytes(pickle.dumps(index))


def by_attribute(run: Path, place: Path) -> None:
    """Through the names that the index may have: getattr of a module's member is a way to everything else."""
    index = plain_index(state(run))
    raw = pickle.dumps(index, protocol=4).replace(b"_get_layout", b"_get_layouX")
    (state(run) / ".metadata").write_bytes(raw)


@pytest.mark.parametrize("harm", [in_the_index, in_bytes, by_attribute])
def test_nothing_in_a_state_is_run(harm, run, files, tmp_path):
    place = tmp_path / "was-here"
    forget_digests(run)
    harm(run, place)
    if harm is in_the_index:  # the way that everybody else reads it, so that the payload is known to work
        plain_index(state(run))
        assert place.exists()
        place.rmdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command, code in (
        (["inspect", state(run)], 0),
        (["export", state(run), "--out", run / "out.safetensors"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *map(str, command)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said and "training state" in said, said
    for read in (open_generator, open_discriminator):  # what generate, probe, walk and attention open it with
        with pytest.raises(AptError):
            read(state(run))
    (worker,) = start_workers(1, train_adversarial, files, TWO, run)
    worker.join()
    assert worker.exitcode != 0 and not place.exists()


def test_a_folder_with_an_index_is_no_state(tmp_path):
    """Only the trainer's own files make one: an index of anybody's is not even opened."""
    (tmp_path / "folder").mkdir()
    place = tmp_path / "was-here"
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Payload(place)))
    for read in (inspect, open_generator, open_discriminator):
        with pytest.raises(AptError):
            read(tmp_path / "folder")
    assert not place.exists()


def test_every_name_that_an_index_may_have_is_one_that_states_have(trained):
    """Those of every torch that the trainer takes come to the same few classes."""
    index = StateReader(state(trained)).read_metadata()
    assert index.state_dict_metadata.keys() == plain_index(state(trained)).state_dict_metadata.keys()


@pytest.mark.parametrize(
    "value", [print, functools.partial(print), copyreg.__newobj__, torch.nn.Linear, Path, complex]
)
def test_other_names_are_refused(value, run):
    forget_digests(run)
    (state(run) / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(AptError, match="not the index of a training state|not a whole training state"):
        StateReader(state(run)).read_metadata()


@pytest.mark.parametrize("relative", ["../__0_0.distcp", "/etc/passwd", "__0_0.distcp/..", "", 3])
def test_an_index_names_files_of_its_own_folder_alone(relative, run):
    forget_digests(run)
    index = plain_index(state(run))
    next(iter(index.storage_data.values())).relative_path = relative
    (state(run) / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(AptError, match="names a file"):
        StateReader(state(run)).read_metadata()


def test_a_tensor_larger_than_what_is_stored_is_not_made(run):
    """60 petabytes by one number."""
    forget_digests(run)
    index = plain_index(state(run))
    next(iter(index.state_dict_metadata.values())).size = torch.Size([2**40, 2**14])
    (state(run) / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(AptError, match="larger than what is stored"):
        open_generator(state(run))


def harms(size: int, count: int, seed: int):
    """Ways to spoil a file of this size: bits flipped, zeros, cut off, grown, emptied."""
    rng = random.Random(seed)
    for number in range(count):
        kind = ("flip", "zeros", "cut", "grow", "empty")[number % 5]
        yield kind, rng.randrange(size), rng.randrange(8)


def spoil(path: Path, kind: str, place: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "flip":
        raw[place] ^= 1 << bit
    elif kind == "zeros":
        raw[place : place + 64] = bytes(len(raw[place : place + 64]))
    elif kind == "cut":
        del raw[place:]
    elif kind == "grow":
        raw += b"more"
    else:
        raw.clear()
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_spoilt_file_is_noticed(name, run):
    """By every reader: 40 ways each, with a digest and, as far as the index can tell, without one."""
    path = state(run) / name
    good, facts = path.read_bytes(), (state(run) / "run.json").read_bytes()
    for kind, place, bit in harms(len(good), 40, seed=1):
        path.write_bytes(good)
        spoil(path, kind, place, bit)
        if path.read_bytes() == good:
            continue
        for digests in (True, False):
            (state(run) / "run.json").write_bytes(facts)
            if not digests:
                forget_digests(run)
            try:
                open_generator(state(run))
                assert not digests, (kind, place, bit)
            except AptError as error:
                assert len(str(error)) < 600
            said = inspect(state(run), deep=True)["loads"]
            assert said.startswith("no: ") or not digests, (kind, place, bit)
            if name == "__0_0.distcp" and kind in ("cut", "grow", "empty"):
                assert inspect(state(run))["loads"].startswith("no: ")  # without reading a number
    path.write_bytes(good)
    (state(run) / "run.json").write_bytes(facts)
    assert inspect(state(run), deep=True)["loads"] == "yes"


def test_a_run_does_not_go_on_from_a_spoilt_state(run, files):
    spoil(state(run) / "__0_0.distcp", "flip", 3000, 2)
    (worker,) = start_workers(1, train_adversarial, files, TWO, run)
    worker.join()
    assert worker.exitcode != 0
    shutil.rmtree(state(run))  # what the sentence says
    run_layout(files, TWO, run)
    assert whole_states(run / "states")[-1].name == "step-000002"


def test_digests_are_those_of_the_files_on_any_number_of_processes(files, tmp_path):
    out = run_layout(files, Layout(2, settings={"updates": 1}), tmp_path / "two")
    folder = out / "states" / "step-000001"
    digests = json.loads((folder / "run.json").read_text(encoding="utf-8"))["files"]
    assert digests.keys() == {path.name for path in folder.iterdir()} - {"run.json"} and len(digests) >= 3
    assert digests == {name: file_digest(folder / name) for name in digests}
    check_digests(folder, digests, digests)


def test_a_state_from_before_digests_opens(run, files):
    forget_digests(run)
    assert open_generator(state(run)).metadata["updates"] == 1
    run_layout(files, TWO, run)
    assert whole_states(run / "states")[-1].name == "step-000002"


def test_only_the_trainers_own_names_are_states_and_only_its_own_leftovers_go(run, files):
    states = run / "states"
    others = ["step-000001.bak", "step-000001 copy", "step-000001-old.part", "step-1", "notes"]
    for name in others:
        shutil.copytree(state(run), states / name)
    shutil.copy(state(run) / "run.json", states / "step-000009.zip")
    for name in ("step-000003.part", "step-000004-half.part"):
        shutil.copytree(state(run), states / name)
    (states / "step-000005").mkdir()
    assert whole_states(states) == [state(run)] and resolve(states) == state(run)
    assert {path.name for path in unfinished_states(states)} == {
        "step-000003.part",
        "step-000004-half.part",
        "step-000005",
    }
    run_layout(files, TWO, run)
    left = {path.name for path in states.iterdir()}
    assert left == {*others, "step-000009.zip", "about.json", "step-000001", "step-000002"}


def holds(files, layout, out, ready):
    """A run that has its folder and does nothing."""
    held = Checkpoints(Keep(out / "states"), World(), {})
    ready.touch()
    time.sleep(600)
    held.release()


def test_two_runs_in_one_folder(files, tmp_path):
    """The second says who the first is, and takes nothing away; when that has died, however it did, the
    folder is free.
    """
    (first,) = start_workers(1, holds, files, None, tmp_path, tmp_path / "ready")
    while not (tmp_path / "ready").exists():
        assert first.is_alive()
    half = tmp_path / "states" / "step-000001.part"
    half.mkdir()
    with pytest.raises(
        AptError,
        match=rf"states is in use by another run \(process {first.pid} on .*since .*\): wait until it ends",
    ):
        Checkpoints(Keep(tmp_path / "states"), World(), {})
    assert half.exists()
    first.kill()
    first.join()
    after = Checkpoints(Keep(tmp_path / "states"), World(), {})
    assert not half.exists()
    after.release()
    Checkpoints(Keep(tmp_path / "states"), World(), {}).release()


def test_dcp_still_reads_our_states(trained):
    """They are plain checkpoints of torch's: whoever wants to may read them without this project."""
    index = plain_index(state(trained))
    name, entry = next(
        (name, entry)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith("generator.weights/")
    )
    value = {name: torch.zeros(entry.size)}
    dcp.load(value, checkpoint_id=state(trained), no_dist=True)
    assert (
        torch.equal(value[name], state_of(trained, 1)[name.replace(".", "/", 1)])
        or value[name].abs().sum() > 0
    )


def test_what_runs_no_code_may_do_harm_too(run):
    """Attributes set on a class for the whole process, and tuples within tuples, of which one small file has
    more than anybody can hash.
    """
    forget_digests(run)
    index = state(run) / ".metadata"
    poison = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nStorageMeta\n"
        b"N}X\x08\x00\x00\x00__init__X\x01\x00\x00\x00xs\x86b."
    )
    index.write_bytes(poison)
    with pytest.raises(AptError, match="it changes a class"):
        StateReader(state(run)).read_metadata()
    assert callable(StorageMeta.__init__) and StorageMeta.__init__ != "x"
    index.write_bytes(b"\x80\x04)" + b"2\x86" * 200 + b"}\x8c\x01x0.")
    with pytest.raises(AptError, match="tuples within tuples"):
        StateReader(state(run)).read_metadata()


@pytest.mark.parametrize("name", ["/dev/zero", "../run.json", "pipe", "__7_0.distcp"])
def test_digests_are_of_the_states_own_files(name, run):
    path = state(run) / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    if name == "pipe":
        os.mkfifo(state(run) / "pipe")
    path.write_text(json.dumps(facts | {"files": facts["files"] | {name: "00"}}), encoding="utf-8")
    with pytest.raises(AptError, match="lacks the file"):
        open_generator(state(run))
    del facts["files"]["__0_0.distcp"]
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(AptError, match="but run.json has no digest for it"):
        open_generator(state(run))


def test_a_run_does_not_go_on_from_a_file_without_a_digest(run):
    """Resume asks what every other reader asks."""
    path = state(run) / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    del facts["files"]["__0_0.distcp"]
    held = Checkpoints(Keep(run / "states"), World(), facts["identity"])
    tensors = {name: torch.zeros(1) for name in ()}
    with pytest.raises(AptError, match="^the index names __0_0.distcp, but run.json has no digest for it"):
        held.load(state(run), {"generator": tensors}, facts)
    held.release()


def test_an_index_of_any_size_is_read_by_the_careful_reader(run):
    """One with 20 MiB of padding, and in it what only that reader refuses."""
    forget_digests(run)
    index = state(run) / ".metadata"
    padding = b"\x80\x04" + b"B" + (20 << 20).to_bytes(4, "little") + bytes(20 << 20) + b"0"
    index.write_bytes(padding + b")" + b"2\x86" * 200 + b"}\x8c\x01x0.")
    with pytest.raises(AptError, match="tuples within tuples"):
        StateReader(state(run)).read_metadata()


@pytest.mark.parametrize(
    "changes", [{"steps": {"generator": "1"}}, {"rows": [3]}, {"files": []}, {"update": -1}]
)
def test_every_reader_of_a_state_has_the_same_facts(changes, run):
    facts = json.loads((state(run) / "run.json").read_text(encoding="utf-8"))
    (state(run) / "run.json").write_text(json.dumps(facts | changes), encoding="utf-8")
    held = Checkpoints(Keep(run / "states"), World(), facts["identity"])
    for read in (open_generator, open_discriminator, held.facts):
        with pytest.raises(AptError, match="run.json is damaged"):
            read(state(run))
    held.release()


def change(path: Path, **changes) -> None:
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        inner, _, leaf = name.rpartition("__")
        (facts[inner] if inner else facts)[leaf] = value
    path.write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("run.json", {"update": None}),
        ("run.json", {"identity__ema_decay": "much"}),
        ("run.json", {"identity__phase": None}),
        ("run.json", {"identity": []}),
        ("about.json", {"lora": ["a", {}]}),
        ("about.json", {"base": 3}),
        ("about.json", {"base": "/nowhere.safetensors"}),
    ],
)
def test_facts_that_cannot_be_are_said_alike_by_all(file, changes, run):
    change((state(run) if file == "run.json" else run / "states") / file, **changes)
    for read in (open_generator, open_discriminator):
        with pytest.raises(AptError):
            read(state(run))
    assert inspect(state(run))["loads"].startswith("no: ")


def test_a_refused_run_leaves_what_belongs_to_the_other(run, files):
    """The facts beside the states are written once the folder is known to be this run's."""
    about = (run / "states" / "about.json").read_bytes()
    (worker,) = start_workers(
        1,
        train_adversarial,
        files,
        Layout(settings={"updates": 2, "batch": 2}),
        run,
        {"keep": Keep(run / "states", every=2, describe=spoil_about(run))},
    )
    worker.join()
    assert worker.exitcode != 0 and (run / "states" / "about.json").read_bytes() == about


def spoil_about(run: Path):
    return functools.partial(describe_state, run / "states", Path("/another/base.safetensors"), {}, (3, None))
