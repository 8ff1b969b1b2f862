"""A run that was killed, stopped or moved to other machines is the run that was not."""

import json
import os
import random
import signal
import time
from functools import partial
from types import SimpleNamespace

import layouts
import pytest
import torch
from layouts import (
    DMD,
    STABLE,
    Layout,
    assert_close,
    mmdit,
    run_layout,
    start_workers,
    state_of,
    train_adversarial,
    train_distill,
)

import trainer.stages.adversarial
from apt_core.errors import AptError
from apt_core.loading.backbones import load_backbone
from trainer.data.batches import Batches
from trainer.machines.parallel import Parallel
from trainer.run.state import Keep, Preempted, best_state
from trainer.run.vote import Vote
from trainer.stages.networks import Lora

ACCUMULATED = Parallel(microbatch=1)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """By number of processes: five updates without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    options = {processes: {"keep": Keep(folder / str(processes) / "states", every=5)} for processes in (1, 2)}
    return {
        n: run_layout(files, Layout(n, ACCUMULATED, STABLE), folder / str(n), options=options[n])
        for n in (1, 2)
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(processes, whole, files, tmp_path):
    layout, options = Layout(processes, ACCUMULATED, STABLE), {"keep": Keep(tmp_path / "states", every=1)}
    workers = start_workers(processes, train_adversarial, files, layout, tmp_path, options)
    while not list((tmp_path / "states").glob("step-*/run.json")):
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    for worker in workers:
        worker.kill()
        worker.join()
    run_layout(files, layout, tmp_path, options=options)
    assert_close(tmp_path, whole[processes], 5, 0)
    assert len(list((tmp_path / "states").iterdir())) == 2  # the last two, and nothing half-written


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_run_moves_to_another_number_of_processes(before, after, files, tmp_path):
    options = {"keep": Keep(tmp_path / "states", every=3)}
    run_layout(
        files, Layout(before, ACCUMULATED, {**STABLE, "updates": 2}), tmp_path, options=options, double=True
    )
    run_layout(files, Layout(after, ACCUMULATED, STABLE), tmp_path, options=options, double=True)
    run_layout(
        files,
        Layout(before, ACCUMULATED, STABLE),
        tmp_path / "whole",
        options={"keep": Keep(tmp_path / "whole" / "states", every=5)},
        double=True,
    )
    assert_close(tmp_path, tmp_path / "whole", 5, 1e-9)


@pytest.mark.parametrize("kind", ["muon", "lora", "mmdit", "dmd_lora"])
def test_every_kind_of_run_goes_on_bit_for_bit(kind, files, tmp_path):
    options = {
        "muon": {},
        "lora": {"start": files.base, "lora": Lora(4, 8.0)},
        "mmdit": {"start": mmdit(files.start), "base": mmdit(files.base), "load": load_backbone},
        "dmd_lora": {"lora": Lora(4, 8.0)},
    }[kind]
    stage1 = {"muon": {"optimizer": "muon", "lr": 1e-2}, "dmd_lora": DMD}
    train, settings = (train_distill if kind in stage1 else train_adversarial), stage1.get(kind, {})
    for out, all_updates in ((tmp_path / "whole", [5]), (tmp_path / "halted", [3, 5])):
        out.mkdir()
        for updates in all_updates:
            keep = Keep(out / "states", every=updates)
            train(
                files,
                Layout(parallel=Parallel(microbatch=2), settings={**settings, "updates": updates}),
                out,
                {"keep": keep, **options},
            )
    assert_close(tmp_path / "halted", tmp_path / "whole", 5, 0)


def stop_in_generator_step(calls: list, *args, **kwargs):
    calls.append(1)
    if len(calls) == 3:  # the first of two microbatches of the second generator step
        os.kill(os.getpid(), signal.SIGTERM)
    return ORIGINAL(*args, **kwargs)


ORIGINAL = trainer.stages.adversarial.generator_backward


def test_sigterm_saves_in_the_middle_of_an_update(files, tmp_path, monkeypatch):
    layout = Layout(1, Parallel(microbatch=2), STABLE)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer.stages.adversarial, "generator_backward", partial(stop_in_generator_step, []))
    options = {"keep": Keep(tmp_path / "states", every=5)}
    with pytest.raises(Preempted, match="stopped by a signal in update 3; all is saved") as stopped:
        train_adversarial(files, layout, tmp_path, options)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-000002-half"]
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    train_adversarial(files, layout, tmp_path, options)
    (tmp_path / "whole").mkdir()
    train_adversarial(
        files, layout, tmp_path / "whole", {"keep": Keep(tmp_path / "whole" / "states", every=5)}
    )
    assert_close(tmp_path, tmp_path / "whole", 5, 0)


def stop_one_of_two(files, layout, out, options):
    """SIGTERM reaches one process, in the second generator step; all must leave at the same place."""
    calls = []
    if os.environ["RANK"] == "1":
        trainer.stages.adversarial.generator_backward = partial(stop_in_generator_step, calls)
    try:
        train_adversarial(files, layout, out, options)
    except Preempted as stop:
        (out / f"{os.environ['RANK']}.txt").write_text(str(stop))
        raise


def test_a_signal_to_one_process_stops_all_at_the_same_place(whole, files, tmp_path):
    layout, options = Layout(2, ACCUMULATED, STABLE), {"keep": Keep(tmp_path / "states", every=5)}
    run_layout(files, layout, tmp_path, stop_one_of_two, options)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "stopped by a signal in update" in said[0]
    assert len(list((tmp_path / "states").iterdir())) == 1
    run_layout(files, layout, tmp_path, options=options)
    assert_close(tmp_path, whole[2], 5, 0)


class Clock:
    """Time that passes as it is told. So many processes ask, of which this is one."""

    size = 2

    def __init__(self):
        self.now, self.asked, self.others = 0.0, [], 0.0

    def __call__(self):
        return self.now

    def largest(self, flag, pace):
        self.asked.append(self.now)
        return [float(flag), max(pace, self.others)]


@pytest.mark.parametrize("seconds, questions", [(0.1, 42), (1.5, 567), (10.0, 1133)])
def test_processes_ask_about_every_three_seconds_and_not_at_every_microbatch(seconds, questions):
    """1,133 microbatches are an update of the paper's batch on 8 processes."""
    clock = Clock()
    vote = Vote(clock, clock=clock)
    for _ in range(1133):
        assert not vote(False)
        clock.now += seconds
    assert len(clock.asked) == pytest.approx(questions, abs=4)
    assert max(b - a for a, b in zip(clock.asked, clock.asked[1:])) <= max(3.0, seconds) + 1e-6


def test_the_slowest_process_sets_the_pace_and_a_new_update_asks_at_once():
    clock = Clock()
    vote, clock.others = Vote(clock, clock=clock), 1.0
    for _ in range(100):
        vote(False)
        clock.now += 0.01
    assert len(clock.asked) == pytest.approx(100 / 3, abs=2)
    vote.start()
    before = len(clock.asked)
    assert vote(True) and len(clock.asked) == before + 1


def test_a_state_of_another_order_of_samples_is_refused_by_name(files, tmp_path):
    train_adversarial(files, Layout(settings={"updates": 1}), tmp_path)
    facts = next((tmp_path / "states").glob("step-*")) / "run.json"
    said = json.loads(facts.read_text())
    del said["identity"]["order"]  # as states were before they named it
    facts.write_text(json.dumps(said))
    with pytest.raises(
        AptError,
        match=(
            r"holds a run of another version of this program, which had no 'order': give another --out, or"
            r" continue with that version, or delete that folder, and those of later stages, to begin anew\."
        ),
    ):
        train_adversarial(files, Layout(settings={"updates": 2}), tmp_path)
    facts.write_text(json.dumps(said | {"identity": said["identity"] | {"order": "feistel-0"}}))
    with pytest.raises(AptError, match=r"holds a run with another order \('feistel-0', now 'feistel-1'\)"):
        train_adversarial(files, Layout(settings={"updates": 2}), tmp_path)


def test_another_run_in_the_same_folder_is_refused(files, tmp_path):
    train_adversarial(files, Layout(settings={"updates": 1}), tmp_path)
    with pytest.raises(
        AptError,
        match=(
            r"holds a run with another r1_weight \(100.0, now 5.0\): give another --out, or the settings of"
            r" that run, or delete that folder, and those of later stages, to begin anew\."
        ),
    ):
        train_adversarial(files, Layout(settings={"updates": 2, "r1_weight": 5.0}), tmp_path)
    with pytest.raises(
        AptError,
        match=(
            "holds the states of a run .step-000001 is the newest.: resume it, or give another --out, or "
            "delete that folder, and those of later stages, to begin anew"
        ),
    ):
        train_adversarial(files, Layout(settings={"updates": 2}), tmp_path, {"resume": False})


def test_a_full_disk_is_named_and_the_last_state_stays(files, tmp_path, monkeypatch):
    train_adversarial(files, Layout(settings={"updates": 1}), tmp_path)
    before = state_of(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(
        AptError,
        match=r"step-000002 could not be written to .*No space left on device.*step-000001 is still there",
    ):
        train_adversarial(files, Layout(settings={"updates": 2}), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in state_of(tmp_path, 1).items())


def test_the_last_and_the_best_states_stay(files, tmp_path):
    scores, seen = iter([3.0, 1.0, 2.0, 5.0, 4.0]), []

    def judge(network):
        seen.append(network.state_dict()["proj_out.weight"].clone())
        return {"judged": next(scores), "judged_motion": 0.5}

    options = {"keep": Keep(tmp_path / "states", every=1, last=1, best=2, judge=judge)}
    train_adversarial(files, Layout(settings={"updates": 5}), tmp_path, options)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [
        "step-000002",
        "step-000003",
        "step-000005",
    ]
    assert best_state(tmp_path / "states") == (tmp_path / "states" / "step-000002", 1.0)
    assert [row["judged"] for row in torch.load(tmp_path / "rows.pt")] == [3.0, 1.0, 2.0, 5.0, 4.0]
    assert {row["judged_motion"] for row in torch.load(tmp_path / "rows.pt")} == {0.5}
    for update in (2, 3, 5):  # what was judged is the average
        assert torch.equal(seen[update - 1], state_of(tmp_path, update)["averages/0.9/proj_out.weight"])


def test_the_end_of_a_run_is_judged_too(files, tmp_path):
    options = {"keep": Keep(tmp_path / "states", every=2, judge=lambda network: {"judged": 1.0})}
    train_adversarial(files, Layout(settings={"updates": 3}), tmp_path, options)
    assert [row.get("judged") for row in torch.load(tmp_path / "rows.pt")] == [None, 1.0, 1.0]


@pytest.mark.parametrize("worlds", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_no_sample_is_lost_or_seen_twice(worlds, files):
    """Eleven updates of eight are eight epochs of the eleven samples, whoever takes part, and whatever is
    resumed in between.
    """
    drawn, numbers = [], []
    for update in range(11):
        size = worlds[update % 3]
        batches = Batches(files.shards, layouts.Text(), seed=0)  # as after a resume
        micros = [
            micro
            for rank in range(size)
            for micro in batches.take(
                "video",
                "video/d",
                update,
                8,
                SimpleNamespace(dp=size, dp_rank=rank),
                2 if update % 2 else None,
            )
        ]
        by_number = dict(
            zip(
                (number for micro in micros for number in micro.numbers),
                (name for micro in micros for name in micro.names),
            )
        )
        numbers += sorted(by_number)
        drawn += [by_number[number] for number in sorted(by_number)]
    assert numbers == list(range(88))
    assert all(
        sorted(drawn[i : i + 11]) == sorted(f"video-{n}.mp4" for n in range(11)) for i in range(0, 88, 11)
    )
