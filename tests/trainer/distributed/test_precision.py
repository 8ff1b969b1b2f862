"""fp32 masters under bf16 compute, fp32 time, and the stop before a weight becomes NaN."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layouts import (
    Layout,
    load_and_watch,
    mmdit,
    run_layouts,
    run_workers,
    state_of,
    tiny_wan,
    train_adversarial,
    write_shards,
)
from torch import nn

from apt_core.errors import AptError, NotFinite
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer
from apt_core.method.objectives import Objective
from apt_core.method.optim import make_rmsprop
from apt_core.models.precision import stays_fp32
from trainer.config import Model
from trainer.data.batches import Micro
from trainer.machines.account import base_bytes
from trainer.machines.counts import sizes_of
from trainer.machines.distributed import World, connect
from trainer.machines.parallel import Parallel, place
from trainer.stages.adversarial import check_batch
from trainer.stages.networks import Lora, Networks, distillation_networks
from trainer.stages.update import Learner

BF16 = Parallel(compute="bf16")


def test_weights_move_at_the_papers_learning_rate(files, tmp_path):
    train_adversarial(
        files, Layout(1, BF16, {"updates": 1, "lr_generator": 3e-6, "lr_discriminator": 3e-6}), tmp_path
    )
    state = state_of(tmp_path, 1)
    for name, start in (("generator/weights/", files.start), ("discriminator/weights/backbone.", files.base)):
        before = load_transformer(start).state_dict()
        after = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        assert all(value.dtype == torch.float32 for value in after.values())
        moved = torch.cat([(value != before[key]).flatten() for key, value in after.items()])
        assert moved.float().mean() > 0.95


def test_bf16_compute_tells_timesteps_apart():
    """bf16 has no 701: it would become 700."""
    with connect("cpu", sharded=True) as world:
        model = place(lambda device: tiny_wan(0).to(device), world, BF16)
        dtypes = []
        model.condition_embedder.time_embedder.linear_1.register_forward_pre_hook(
            lambda module, args: dtypes.append((args[0].dtype, module.weight.dtype))
        )
        x, text = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 5, 10)
        outputs = [model(x, torch.tensor([t]), text, return_dict=False)[0] for t in (700.0, 701.0)]
    assert outputs[0].dtype == torch.bfloat16 and not torch.equal(*outputs)
    assert dtypes == [(torch.float32, torch.float32)] * 2


def compare_times(base: Path, out: Path) -> None:
    """Of stage 1's student, whole and as a LoRA: the time embedder's output at timesteps 700 and 701, the
    velocities, bytes of the frozen base.
    """
    found = {}
    with connect("cpu", sharded=True) as world:
        torch.manual_seed(0)
        x, text = (
            torch.randn(1, 4, 2, 4, 6).expand(2, -1, -1, -1, -1),
            torch.randn(1, 5, 10).expand(2, -1, -1),
        )
        for mode, lora in (("full", None), ("lora", Lora(2))):
            networks, times = distillation_networks(base, load_backbone, world, BF16, lora, target=False), []
            network = networks.base or networks.generator
            embedder = next(
                module for name, module in network.named_modules() if name.endswith("time_embedder")
            )
            embedder.register_forward_hook(
                lambda _module, _args, output: times.append(output.detach().clone())
            )
            with torch.no_grad():
                velocity = networks.generator(x, torch.tensor([700.0, 701.0]), text, return_dict=False)[
                    0
                ].float()
            found[mode] = {"time": times[0], "velocity": velocity}
        weights = {name: p for name, p in networks.base.named_parameters() if ".adapters." not in name}
        held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in weights.values())
        found["bytes"] = sum(world.gather(held))
        if world.main:
            torch.save(found, out)


@pytest.mark.parametrize("kind", ["wan", "mmdit"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_lora_tells_timesteps_apart_as_well_as_the_whole_network(kind, processes, files, tmp_path):
    base = files.base if kind == "wan" else mmdit(files.base)
    run_workers(processes, compare_times, base, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    full, lora = found["full"], found["lora"]
    assert lora["time"].dtype == torch.float32 and torch.equal(lora["time"], full["time"])
    apart, expected = (mode["velocity"][1] - mode["velocity"][0] for mode in (lora, full))
    assert expected.norm() > 0.05 and apart.norm() == pytest.approx(
        float(expected.norm()), rel=0.02 if kind == "wan" else 1e-6
    )
    # The account has the miniature's 256 channels of sines and 4 of latents; a tiny Wan has fewer of the
    # first.
    model = Model(
        kind=kind, layers=4, heads=2, head_dim=12, ffn=48 if kind == "wan" else 96, channels=4, text_dim=10
    )
    sines = 4 * 24 * (256 - 16) if kind == "wan" else 0
    assert found["bytes"] == processes * base_bytes(sizes_of(model), "bf16", processes) - sines


@pytest.mark.parametrize("processes", [1, 2])
def test_a_base_in_bf16_stays_as_it_was_to_the_last_bit(processes, files, tmp_path):
    jobs = []
    for kind in ("wan", "mmdit"):
        base = files.base if kind == "wan" else mmdit(files.base)
        options = {"base": base, "start": base, "lora": Lora(4, 8.0), "load": load_and_watch}
        jobs.append(
            (
                Layout(processes, Parallel(1, "bf16", checkpointing="blocks"), {"lr_generator": 1e-3}),
                tmp_path / kind,
                train_adversarial,
                options,
            )
        )
    run_layouts(files, processes, jobs, double=False)
    for _, out, _, options in jobs:
        after, before = torch.load(out / "base.pt"), load_backbone(options["base"]).state_dict()
        assert after.keys() == before.keys()
        for name, value in after.items():
            exact = stays_fp32(load_backbone(options["base"], device="meta"), name)
            assert value.dtype == (torch.float32 if exact else torch.bfloat16)
            assert torch.equal(value, before[name] if exact else before[name].bfloat16()), name
        moved = [
            value
            for name, value in state_of(out, 5).items()
            if name.startswith("generator/weights/") and "lora_B" in name
        ]
        assert len(moved) > 20 and max(value.abs().max() for value in moved) > 1e-3


def test_a_broken_sample_stops_the_run_and_is_written_down(files, tmp_path):
    write_shards(tmp_path / "shards", broken=4)
    broken = type(files)(files.base, files.start, tmp_path / "shards")
    layout = Layout(1, Parallel(microbatch=1), {"updates": 3})
    said = (
        r"of the discriminator became nan on video-4.mp4 \(all of them are in"
        r" .*not-finite-discriminator.json\); "
        "no weight has changed"
    )
    with pytest.raises(NotFinite, match=said) as error:
        train_adversarial(broken, layout, tmp_path)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "states" / "not-finite-discriminator.json").read_text(encoding="utf-8"))[
        "samples"
    ] == ["video-4.mp4"]


def test_an_infinite_gradient_stops_before_the_step(tmp_path):
    """Losses may still be finite: then nobody knows which sample it was, and all are named."""
    network = nn.Linear(2, 1)
    learner = Learner(
        "generator",
        network,
        make_rmsprop(network.parameters(), 0.1),
        Networks(network, None),
        World(),
        Parallel(),
        3,
        tmp_path,
    )
    before = network.weight.detach().clone()
    batch = [
        Micro([0], [0], torch.zeros(1, 2), torch.zeros(1, 2), ["a.mp4"], 0.5),
        Micro([1], [1], torch.zeros(1, 2), torch.zeros(1, 2), ["b.mp4"], 0.5),
    ]
    for _ in learner.microbatches(batch, lambda: None):
        network.weight.grad, network.bias.grad = torch.full((1, 2), float("inf")), torch.zeros(1)
        learner.add({"g_loss": torch.tensor(1.0)})
    with pytest.raises(
        AptError,
        match=r"generator_gradient of the generator became inf on a.mp4, b.mp4 \(all of them are in .*\); "
        "no weight has changed",
    ):
        learner.step()
    assert torch.equal(network.weight, before) and learner.steps == 0 and network.weight.grad is None


def test_penalised_samples_must_reach_every_process():
    """A process without a perturbed pass would leave the others waiting for its part of the weights."""
    objective, two = Objective(reg_fraction=0.3), SimpleNamespace(dp=2, dp_rank=0)
    check_batch(objective, 8, two, Parallel())  # 3 samples: two and one
    with pytest.raises(
        AptError,
        match=(
            "reg_fraction=0.3 of a batch of 8 is 3 samples for the penalties, "
            "which leaves some of 2 processes without one in a microbatch"
        ),
    ):
        check_batch(objective, 8, two, Parallel(microbatch=1))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_read(tmp_path):
    files = type("Files", (), {"base": tmp_path / "none", "start": tmp_path / "none"})
    write_shards(tmp_path / "shards")
    files.shards = tmp_path / "shards"
    with pytest.raises(
        AptError,
        match="batch of 4 does not divide into microbatches of 3 on 1 processes: make it a multiple of 3",
    ):
        train_adversarial(files, Layout(1, Parallel(microbatch=3)), tmp_path)
