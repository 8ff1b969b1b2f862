"""Roles on one base that FSDP2 shards: two processes with a sample each against one process with both."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import double
from tiny_models import tiny_mmdit, tiny_wan
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from apt_core.method.discriminator import Discriminator
from apt_core.method.generator import one_step
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward
from apt_core.method.optim import make_rmsprop
from apt_core.models.lora import add_adapters, lora_state, merged_state, role


def build(kind):
    base = {"wan": tiny_wan, "mmdit": tiny_mmdit}[kind](layers=4)
    add_adapters(base, ["generator", "discriminator"], rank=2)
    with torch.no_grad():
        for name in ("generator", "discriminator"):
            for p in role(base, name).parameters():
                p.normal_(std=0.1)
    base.to(torch.get_default_dtype())  # adapters are fp32 whatever the base is
    discriminator = Discriminator(role(base, "discriminator"))
    discriminator.enable_gradient_checkpointing()
    return base, role(base, "generator"), discriminator


def shard(base, discriminator, dtype=None):
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.get_default_dtype(), cast_forward_inputs=False
    )
    for block in base.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(base, mp_policy=policy)
    # The role's adapters are the base's business.
    fully_shard(discriminator, mp_policy=policy, ignored_params=set(discriminator.backbone.parameters()))


def train(base, generator, discriminator, mode, part=slice(None)):
    """Two updates of D and G; the numbers of this part of the batch, and the weights of both at the end."""
    objective = Objective.paper("video")
    optimizers = [make_rmsprop(network.parameters(), 1e-3) for network in (generator, discriminator)]
    numbers = []
    for update in range(2):
        real, z, text, t, noise = inputs(update, part)
        with torch.no_grad():
            fake = one_step(generator, z, text)
        metrics = discriminator_backward(discriminator, objective, real, fake, text, t, noise, mode=mode)
        numbers += [metrics[name] for name in ("d_loss", "r1", "logit_real", "logit_fake")]
        optimizers[1].step()
        optimizers[1].zero_grad()
        metrics = generator_backward(generator, discriminator, objective, z, text, t)
        numbers += [metrics[name] for name in ("g_loss", "grad_norm")]
        optimizers[0].step()
        optimizers[0].zero_grad()
    heads = {name: p for name, p in discriminator.named_parameters() if "lora" not in name}
    heads = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in heads.items()}
    return (
        torch.stack(numbers),
        merged_state(base, "generator"),
        merged_state(base, "discriminator"),
        lora_state(base, "generator"),
        heads,
    )


def mixed_precision(kind):
    """One bf16 sample and its gradients' dtypes, from a bf16 base with fp32 adapters in one FSDP unit."""
    base, generator, discriminator = build(kind)
    for name, p in base.named_parameters():
        if ".adapters." not in name:
            p.data = p.data.bfloat16()
    shard(base, discriminator, torch.bfloat16)
    sample = one_step(generator, *inputs(0)[1:3])
    sample.square().mean().backward()
    return sample.detach(), {p.grad.dtype for p in generator.parameters()}


def inputs(update, part=slice(None)):
    """real, z, text, t, noise"""
    g = torch.Generator().manual_seed(update)
    real, z, noise = (torch.randn(2, 4, 2, 4, 6, generator=g)[part] for _ in range(3))
    return real, z, torch.randn(2, 5, 10, generator=g)[part], torch.rand(2, generator=g)[part], noise


def work(rank, port, kind, mode, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with double():  # RMSProp moves a weight by its gradient's sign: where that is near zero, rounding decides
        base, generator, discriminator = build(kind)
        shard(base, discriminator)
        sharded = [
            isinstance(p, DTensor)
            for network in (base, generator, discriminator)
            for p in network.parameters()
        ]
        numbers, *weights = train(base, generator, discriminator, mode, slice(rank, rank + 1))
        dist.all_reduce(numbers)
    half = mixed_precision(kind)
    if rank == 0:
        torch.save((sharded, *half, numbers / 2, *weights), out)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind, mode, adapted", [("wan", "separate", 40), ("mmdit", "two_pass", 14 * 3 + 10)])
def test_two_processes_are_one(tmp_path, kind, mode, adapted):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Not spawn: one import of torch serves all processes.
    multiprocessing.set_forkserver_preload(
        ["apt_core.models.lora", "apt_core.models.wan", "torch.distributed.fsdp"]
    )
    mp.start_processes(work, (port, kind, mode, tmp_path / "out.pt"), nprocs=2, start_method="forkserver")
    sharded, sample, dtypes, *found = torch.load(tmp_path / "out.pt")
    generator = build(kind)[1]
    with torch.no_grad():
        exact = one_step(generator, *inputs(0)[1:3])
    with double():
        untouched = merged_state(build(kind)[0], None)
        numbers, *expected = train(*build(kind), mode)
    assert all(sharded)
    torch.testing.assert_close(found[0], numbers, rtol=1e-9, atol=1e-9)
    for state, other in zip(found[1:], expected, strict=True):
        assert state.keys() == other.keys()
        for key in other:
            torch.testing.assert_close(state[key], other[key], rtol=0, atol=1e-9)
    moved = [key for key in untouched if not torch.equal(found[1][key], untouched[key])]
    # the adapted weights of G, and none else
    assert len(moved) == adapted and all(key.startswith("blocks.") for key in moved)
    assert dtypes == {torch.float32} and 0 < (sample - exact).norm() / exact.norm() < 0.02
