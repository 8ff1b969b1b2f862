"""Stage 1 by distribution matching as a run: two time scales, what each setting changes, what it leaves."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from layouts import DISTILL, DMD, Layout, assert_close, state_of, train_distill

import trainer.stages.dmd
from apt_core.errors import AptError
from apt_core.files.tensorfile import read_tensors
from apt_core.loading.checkpoint import load_transformer
from trainer.checkpoints.starting_models import describe_state
from trainer.checkpoints.trained_models import open_generator
from trainer.config import Distill
from trainer.machines.parallel import Parallel
from trainer.run.folders import whole_states
from trainer.run.state import Keep, Preempted
from trainer.settings import ONLY_OF
from trainer.stages.networks import Lora

ONE_UPDATE = DISTILL | {"updates": 1, "video_share": 1.0}
ORIGINAL = trainer.stages.dmd.fake_backward


def train(files, out, options=None, **settings):
    """History and last state of two updates."""
    out.mkdir(parents=True)
    train_distill(files, Layout(settings={**DMD, "updates": 2, "video_share": 1.0, **settings}), out, options)
    return torch.load(out / "rows.pt"), state_of(out, 2)


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    return train(files, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"t_min": 0.9},
        {"t_max": 0.1},
        {"t_shift": 12.0},
        {"guidance": 1.0},
        {"weighting": "kl"},
        {"regression": 0.25, "regression_steps": 2},
        {"fake_updates": 1},
        {"lr_fake": 1e-3},
        {"optimizer": "muon"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_setting_moves_the_generator_elsewhere(settings, plain, files, tmp_path):
    """Nothing else differs, down to the last bit: so the setting does."""
    rows, state = train(files, tmp_path / "run", **settings)
    name = "student/weights/blocks.0.attn1.to_q.weight"
    assert not torch.equal(state[name], plain[1][name])
    assert ("dmd_regression_loss_video" in rows[0]) == ("regression" in settings)


def test_the_fake_score_has_its_own_pace_and_rate(plain, files, tmp_path):
    rows, state = train(files, tmp_path / "run", fake_updates=3, lr_fake=1e-4)
    for found, count, rate in ((plain[1], 2, 1e-5), (state, 3, 1e-4)):
        steps = {float(value) for key, value in found.items() if key.startswith("fake/step/")}
        assert steps == {2 * count}  # in two updates
        moved = max(
            float(value.abs().max())
            for key, value in found.items()
            if key.startswith("fake/weights") and key.endswith("lora_B.weight")
        )
        # B starts from zero, and no step of Adam is much longer than its rate.
        assert 0.9 * rate < moved < 1.5 * 2 * count * rate
        assert {float(v) for key, v in found.items() if key.startswith("student/step/")} == {2.0}
    figures = {"fake_loss_video", "dmd_gap_video", "dmd_real_distance_video", "dmd_grad_norm_video"}
    assert all(figures | {"fake_gradient", "student_gradient"} <= row.keys() for row in rows)
    assert all(value > 0 for row in rows for value in row.values())


def test_the_two_scores_are_one_until_the_fake_one_has_learned(files, tmp_path):
    """With a fake score that may hardly move, and no guidance, there is nothing to match."""
    rows, _ = train(files, tmp_path / "run", guidance=1.0, lr_fake=1e-12)
    moving, _ = train(files, tmp_path / "moving", guidance=1.0, lr_fake=1e-2)
    assert rows[0]["dmd_gap_video"] < 1e-5 < 1e-2 < moving[0]["dmd_gap_video"]


@pytest.mark.parametrize("lora", [None, Lora(3, 6.0)])
def test_what_it_leaves_is_a_generator_whole_or_as_a_lora(lora, files, tmp_path):
    rows, state = train(files, tmp_path / "run", {"lora": lora} if lora else None)
    tensors, header = read_tensors(tmp_path / "run" / "generator.safetensors")
    about = json.loads(header.metadata["apt"])
    assert about["phase"] == "distilled" and about["kind"] == ("lora" if lora else "generator")
    assert all(("lora_" in name) == bool(lora) for name in tensors)
    assert not any("adapters" in name or "fake" in name for name in tensors)
    states = tmp_path / "run" / "states"
    describe_state(states, files.base, {"kind": "generator"}, lora and (lora.rank, lora.alpha))
    opened = open_generator(states / "step-000002", ema=0.0).model.state_dict()
    assert opened and all(
        torch.equal(value, state[f"student/weights/{key}"]) for key, value in opened.items()
    )
    if not lora:
        base = load_transformer(files.base).state_dict()
        assert opened.keys() == base.keys()
        assert any(not torch.equal(value, base[key]) for key, value in opened.items())


@pytest.mark.parametrize("method, network", [("dmd", "fake"), ("consistency", "student")])
def test_adapters_start_from_the_seed_whatever_was_drawn_before(method, network, files, tmp_path):
    """The first gradient of B is made by A."""
    found = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        rows, _ = train(files, tmp_path / str(drawn), {"lora": Lora(3, 6.0)}, method=method)
        found.append(rows[0][f"{network}_gradient"])
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-5)


def stop_at(call: int, calls: list, *args, **kwargs):
    calls.append(1)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGTERM)
    return ORIGINAL(*args, **kwargs)


STOPPED = Layout(1, Parallel(microbatch=2), DMD | {"updates": 3, "video_share": 1.0})


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_distill(files, STOPPED, out, {"keep": Keep(out / "states", every=3)})
    return out


@pytest.mark.parametrize("call, saved", [(5, "step-000001"), (7, "step-000001-half")])
def test_a_run_that_is_stopped_among_fake_updates_goes_on_bit_for_bit(
    call, saved, whole, files, tmp_path, monkeypatch
):
    """Two microbatches a step and two fake steps an update: call 5 is in the first of the second update, call
    7 in the second.
    """
    options = {"keep": Keep(tmp_path / "states", every=3)}
    monkeypatch.setattr(trainer.stages.dmd, "fake_backward", partial(stop_at, call, []))
    with pytest.raises(Preempted, match="stopped by a signal in update 2; all is saved"):
        train_distill(files, STOPPED, tmp_path, dict(options))
    assert [path.name for path in (tmp_path / "states").iterdir()] == [saved]
    monkeypatch.undo()
    train_distill(files, STOPPED, tmp_path, dict(options))
    assert_close(tmp_path, whole, 3, 0)


def test_a_second_stop_in_the_same_update_is_saved_too(whole, files, tmp_path, monkeypatch):
    """One fake step of two is saved; the run that goes on from there is stopped after the other."""
    options = {"keep": Keep(tmp_path / "states", every=3)}
    monkeypatch.setattr(trainer.stages.dmd, "fake_backward", partial(stop_at, 7, []))
    with pytest.raises(Preempted):
        train_distill(files, STOPPED, tmp_path, dict(options))
    calls, original = [], trainer.stages.dmd.dmd_backward

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer.stages.dmd, "fake_backward", partial(stop_at, 0, calls))
    monkeypatch.setattr(trainer.stages.dmd, "dmd_backward", stop)
    with pytest.raises(Preempted):
        train_distill(files, STOPPED, tmp_path, dict(options))
    names = [path.name for path in whole_states(tmp_path / "states")]
    assert names == ["step-000001-half", "step-000001-half2"] and len(calls) == 2
    monkeypatch.undo()
    train_distill(files, STOPPED, tmp_path, dict(options))
    assert_close(tmp_path, whole, 3, 0)


def resumed(files, out, **settings):
    return train_distill(files, Layout(settings={"video_share": 1.0, **settings}), out)


@pytest.mark.parametrize(
    "method, of_the_other, own",
    [
        ("consistency", {"t_min": 0.5, "fake_updates": 1, "regression": 1.0}, {"target_decay": 0.5}),
        ("dmd", {"steps": 9, "target_decay": 0.5}, {"t_min": 0.5}),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_setting_of_the_other_method_does_not_stop_a_run_from_going_on(
    method, of_the_other, own, earlier, files, tmp_path
):
    """earlier: with a state whose identity still has the settings of both methods."""
    settings = {"method": method, "fake_updates": 1} if method == "dmd" else {"method": method}
    resumed(files, tmp_path, updates=1, **settings)
    facts = tmp_path / "states" / "step-000001" / "run.json"
    said = json.loads(facts.read_text())
    assert not said["identity"].keys() & of_the_other.keys() and said["identity"].keys() > own.keys()
    if earlier:
        both = Distill(**ONE_UPDATE | settings).model_dump(exclude={"updates"}) | said["identity"]
        assert both.keys() >= {*ONLY_OF["dmd"], *ONLY_OF["consistency"]}
        facts.write_text(json.dumps(said | {"identity": both}))
    with pytest.raises(AptError, match=f"holds a run with another {next(iter(own))}"):
        resumed(files, tmp_path, updates=2, **settings | own)
    other = {"consistency": "dmd", "dmd": "consistency"}[method]
    with pytest.raises(AptError, match=f"holds a run with another method \\('{method}', now '{other}'\\)"):
        resumed(files, tmp_path, updates=2, method=other)
    resumed(files, tmp_path, updates=2, **of_the_other | settings)
    assert (tmp_path / "states" / "step-000002").is_dir()


def test_what_only_one_method_looks_at_is_what_its_docstring_says():
    said = {name: field.description for name, field in Distill.model_fields.items()}
    of = {
        method: {name for name, text in said.items() if text.startswith(f"{method}:")} for method in ONLY_OF
    }
    assert of == {method: set(names) for method, names in ONLY_OF.items()}
