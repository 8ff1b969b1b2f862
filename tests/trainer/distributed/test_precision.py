"""fp32 masters under bf16 compute, fp32 time, and the stop before a weight becomes NaN."""

import json
from types import SimpleNamespace

import pytest
import torch
from layouts import Layout, state_of, tiny_wan, train_adversarial, write_shards
from torch import nn

from apt_core.checkpoint import load_transformer
from apt_core.errors import AptError
from apt_core.objectives import Objective
from apt_core.optim import make_rmsprop
from trainer.adversarial import check_batch
from trainer.batches import Micro
from trainer.distributed import World, connect
from trainer.networks import Networks
from trainer.parallel import Parallel, place
from trainer.update import Learner

BF16 = Parallel(compute="bf16")


def test_weights_move_at_the_papers_learning_rate(files, tmp_path):
    train_adversarial(files, Layout(1, BF16, {"updates": 1, "lr_generator": 3e-6, "lr_discriminator": 3e-6}), tmp_path)
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
        model.condition_embedder.time_embedder.linear_1.register_forward_pre_hook(lambda module, args: dtypes.append((args[0].dtype, module.weight.dtype)))
        x, text = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 5, 10)
        outputs = [model(x, torch.tensor([t]), text, return_dict=False)[0] for t in (700.0, 701.0)]
    assert outputs[0].dtype == torch.bfloat16 and not torch.equal(*outputs)
    assert dtypes == [(torch.float32, torch.float32)] * 2


def test_a_broken_sample_stops_the_run_and_is_written_down(files, tmp_path):
    write_shards(tmp_path / "shards", broken=4)
    broken = type(files)(files.base, files.start, tmp_path / "shards")
    layout = Layout(1, Parallel(microbatch=1), {"updates": 3})
    said = r"of the discriminator became nan on video-4.mp4, all in .*not-finite-discriminator.json; no weight has moved"
    with pytest.raises(AptError, match=said) as error:
        train_adversarial(broken, layout, tmp_path)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "states" / "not-finite-discriminator.json").read_text(encoding="utf-8"))["samples"] == ["video-4.mp4"]


def test_an_infinite_gradient_stops_before_the_step(tmp_path):
    """Losses may still be finite: then nobody knows which sample it was, and all are named."""
    network = nn.Linear(2, 1)
    learner = Learner("generator", network, make_rmsprop(network.parameters(), 0.1), Networks(network, None), World(), Parallel(), 3, tmp_path)
    before = network.weight.detach().clone()
    batch = [Micro([0], [0], torch.zeros(1, 2), torch.zeros(1, 2), ["a.mp4"], 0.5), Micro([1], [1], torch.zeros(1, 2), torch.zeros(1, 2), ["b.mp4"], 0.5)]
    for _ in learner.microbatches(batch, lambda: None):
        network.weight.grad, network.bias.grad = torch.full((1, 2), float("inf")), torch.zeros(1)
        learner.add({"g_loss": torch.tensor(1.0)})
    with pytest.raises(AptError, match=r"generator_gradient of the generator became inf on a.mp4, b.mp4, all in .*; no weight has moved"):
        learner.step()
    assert torch.equal(network.weight, before) and learner.steps == 0 and network.weight.grad is None


def test_penalised_samples_must_reach_every_process():
    """A process without a perturbed pass would leave the others waiting for its part of the weights."""
    objective, two = Objective(reg_fraction=0.3), SimpleNamespace(dp=2, dp_rank=0)
    check_batch(objective, 8, two, Parallel())  # 3 samples: two and one
    with pytest.raises(AptError, match="reg_fraction 0.3 of a batch of 8 is 3 samples, which leaves some of 2 processes without one in a microbatch"):
        check_batch(objective, 8, two, Parallel(microbatch=1))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_read(tmp_path):
    files = type("Files", (), {"base": tmp_path / "none", "start": tmp_path / "none"})
    write_shards(tmp_path / "shards")
    files.shards = tmp_path / "shards"
    with pytest.raises(AptError, match="batch of 4 does not divide into microbatches of 3 on 1 processes: make it a multiple of 3"):
        train_adversarial(files, Layout(1, Parallel(microbatch=3)), tmp_path)
