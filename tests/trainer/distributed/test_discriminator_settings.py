"""What the paper tried on the discriminator and decided against: each setting changes what it names, whole
and as a LoRA, alone and sharded.
"""

import json

import pytest
import torch
from layouts import Layout, assert_close, mmdit, run_layout, run_layouts, state_of, train_adversarial

from apt_core.errors import AptError
from apt_core.files.tensorfile import read_tensors
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer
from apt_core.method.discriminator import Discriminator
from apt_core.models.lora import LORA_PREFIX
from trainer.checkpoints.starting_models import describe_state
from trainer.checkpoints.trained_models import open_discriminator, open_generator
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Lora, adversarial_networks

LORA = Lora(4, 8.0)
CHANGED = {
    "train_backbone": False,
    "taps": [0.5, 0.75],
    "discriminator_start": "start",
    "discriminator_time": 0.25,
    "lr_generator": 1e-3,
    "lr_discriminator": 1e-3,
}
TRAINED = {
    "taps": [0.5, 0.75],
    "discriminator_start": "start",
    "lr_generator": 1e-3,
    "lr_discriminator": 1e-3,
}


def networks(files, lora=None, start=None, **options):
    return adversarial_networks(
        start or files.start, files.base, load_backbone, World(), Parallel(), lora, **options
    )


@pytest.mark.parametrize(
    "fractions, taps", [((4 / 9, 13 / 18, 1.0), (2, 3, 4)), ((1.0,), (4,)), ((0.25, 0.5), (1, 2))]
)
def test_taps_are_the_heads_and_the_last_is_the_depth(fractions, taps, files):
    discriminator = networks(files, taps=fractions).discriminator
    assert (
        discriminator.taps == taps
        and len(discriminator.heads) == len(taps)
        and len(discriminator.backbone.blocks) == taps[-1]
    )
    assert discriminator.logit.in_features == 24 * len(taps)
    block = sum(p.numel() for p in load_transformer(files.base).blocks[0].parameters())
    assert sum(p.numel() for p in discriminator.backbone.blocks.parameters()) == taps[-1] * block
    lora = networks(files, LORA, files.base, taps=fractions)
    assert {name.split(".")[1] for name in lora.discriminator.backbone.adapters()} == {
        str(i) for i in range(taps[-1])
    }
    assert len(lora.base.blocks) == 4  # the generator keeps them all


def test_taps_that_a_base_is_too_shallow_for_are_one_sentence(files):
    with pytest.raises(
        AptError,
        match=r"a model of 4 blocks is too shallow for taps at \(0.9, 1.0\): they fall on blocks \(4, 4\).",
    ):
        networks(files, taps=(0.9, 1.0))


@pytest.mark.parametrize("origin", ["base", "start"])
def test_the_discriminator_starts_from_the_file_that_is_named(origin, files):
    first = networks(files, discriminator_start=origin).discriminator.backbone.state_dict()
    expected, other = (
        load_transformer(path).state_dict()
        for path in ((files.base, files.start) if origin == "base" else (files.start, files.base))
    )
    assert all(torch.equal(value, expected[name]) for name, value in first.items())
    assert not torch.equal(first["blocks.0.attn1.to_q.weight"], other["blocks.0.attn1.to_q.weight"])


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Runs with everything changed, in one process and sharded over two; those of a LoRA start from the file
    of a run of one.
    """
    folder = tmp_path_factory.mktemp("changed")
    lora = {"base": files.base, "lora": LORA}
    first = (
        Layout(settings={"lr_generator": 1e-2}),
        folder / "start",
        train_adversarial,
        lora | {"start": files.base},
    )
    lora["start"] = folder / "start" / "generator.safetensors"
    mm = {"base": mmdit(files.base), "start": mmdit(files.start), "load": load_backbone}
    kinds = {
        "full": ({}, CHANGED),
        "lora": (lora, CHANGED),
        "mmdit": (mm, CHANGED),
        "lora_trained": (lora, TRAINED),
    }
    for processes, parallel in ((1, Parallel()), (2, Parallel(1, checkpointing="blocks"))):
        jobs = [
            (
                Layout(processes, parallel, settings),
                folder / f"{kind}_{processes}",
                train_adversarial,
                dict(options),
            )
            for kind, (options, settings) in kinds.items()
        ]
        run_layouts(files, processes, [first, *jobs] if processes == 1 else jobs)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora", "mmdit", "lora_trained"])
def test_two_processes_give_the_losses_and_weights_of_one(kind, runs):
    assert_close(runs / f"{kind}_2", runs / f"{kind}_1", 5, 1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_still_backbone_stays_as_it_was_to_the_last_bit(processes, runs, files):
    for kind, path in (("full", files.start), ("mmdit", mmdit(files.start))):
        state, first = state_of(runs / f"{kind}_{processes}", 5), load_backbone(path).state_dict()
        backbone = {
            name.removeprefix("discriminator/weights/backbone."): value
            for name, value in state.items()
            if name.startswith("discriminator/weights/backbone.")
        }
        # an MMDiT's last text stream is cut
        assert len(backbone) > 20 and all(
            torch.equal(value, first[name][: len(value)]) for name, value in backbone.items()
        )
        assert not any(name.startswith("discriminator/square_avg/backbone.") for name in state)
        assert state["discriminator/square_avg/heads.1.to_q.weight"].abs().max() > 0
        query = "blocks.0.attn1.to_q.weight" if kind == "full" else "blocks.0.visual.to_q.weight"
        assert not torch.equal(state[f"generator/weights/{query}"], first[query])


@pytest.mark.parametrize("processes", [1, 2])
def test_still_adapters_stay_those_of_the_start_and_trained_ones_move(processes, runs):
    file, _ = read_tensors(runs / "start" / "generator.safetensors")
    key = f"{LORA_PREFIX}blocks.0.self_attn.q"
    assert file[f"{key}.lora_B.weight"].abs().max() > 1e-3
    still, trained = (state_of(runs / f"{kind}_{processes}", 5) for kind in ("lora", "lora_trained"))
    name = "discriminator/weights/backbone.blocks.0.attn1.to_q"
    assert torch.equal(still[f"{name}.lora_A.weight"], file[f"{key}.lora_A.weight"])
    # the scale alpha / rank is baked into the file
    assert torch.equal(still[f"{name}.lora_B.weight"], file[f"{key}.lora_B.weight"] / 2)
    far = (trained[f"{name}.lora_A.weight"] - file[f"{key}.lora_A.weight"]).abs().max()
    assert 0 < far < 0.1  # it started there, and moved by the rate's steps


@pytest.mark.parametrize("fixed", [0.0, 0.25, None])
def test_every_pass_of_the_discriminator_sees_the_fixed_time(fixed, files, tmp_path, monkeypatch):
    seen, forward = [], Discriminator.forward

    def watched(self, x, t, text):
        seen.append(t.clone())
        return forward(self, x, t, text)

    monkeypatch.setattr(Discriminator, "forward", watched)
    train_adversarial(
        files, Layout(settings={"updates": 2, "discriminator_time": fixed}), tmp_path, {"watch_every": 1}
    )
    times = torch.cat(seen)
    # three passes of the discriminator's step and one of the generator's, twice, and the floor of aR1
    assert len(times) > 2 * (3 * 4 + 4)
    assert times.unique().tolist() == [fixed] if fixed is not None else len(times.unique()) > 10


def test_a_state_is_opened_with_the_discriminator_that_it_was_trained_with(files, tmp_path):
    run_layout(files, Layout(settings={"updates": 1, "taps": [0.5, 0.75]}), tmp_path)
    describe_state(tmp_path / "states", files.base, {}, None)
    discriminator, _ = open_discriminator(tmp_path / "states")
    assert discriminator.taps == (2, 3) and len(discriminator.backbone.blocks) == 3
    trained = state_of(tmp_path, 1)
    assert all(
        torch.equal(value, trained[f"discriminator/weights/{name}"])
        for name, value in discriminator.state_dict().items()
    )


def test_a_state_from_before_the_settings_can_still_be_opened(files, tmp_path):
    """It had the paper's taps, and averages with a warm-up of 10."""
    run_layout(files, Layout(settings={"updates": 1}), tmp_path)
    describe_state(tmp_path / "states", files.base, {}, None)
    path = tmp_path / "states" / "step-000001" / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name in ("taps", "ema_warmup", "discriminator_time"):
        del facts["identity"][name]
    path.write_text(json.dumps(facts), encoding="utf-8")
    assert open_discriminator(tmp_path / "states")[0].taps == (2, 3, 4)
    assert open_generator(tmp_path / "states").metadata["ema_warmup"] == 10


def test_sigma_in_time_reaches_the_penalty_and_the_log(files, tmp_path):
    """Clips of two frames: half of the noise is in time. Off, the run is the one without the setting."""
    rows = {}
    for name, settings in (("off", {}), ("same", {"r1_sigma_time": 0.1}), ("time", {"r1_sigma_time": 1e-3})):
        out = tmp_path / name
        out.mkdir()
        layout = Layout(settings={"updates": 1, **settings})
        train_adversarial(files, layout, out, {"keep": None})
        rows[name] = torch.load(out / "rows.pt")[0]
    assert "r1_gamma_time" not in rows["off"] and rows["off"]["r1_gamma"] == pytest.approx(1.0)
    assert rows["time"]["r1_gamma_time"] == pytest.approx(1e-4) and rows["time"]["r1_gamma"] == pytest.approx(
        1.0
    )
    assert rows["same"]["r1"] == pytest.approx(rows["off"]["r1"], rel=1e-3)
    assert rows["time"]["r1"] < 0.9 * rows["off"]["r1"]
    assert rows["time"]["r1_floor"] > 0
