"""The same computations by one process, and by two and four that share the tokens."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import double, start
from tiny_models import tiny_mmdit, tiny_wan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from apt_core.engine.context_parallel import enable
from apt_core.errors import AptError
from apt_core.method.discriminator import Discriminator
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward
from apt_core.models.lora import add_adapters, role
from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.wan import WanBackbone, predict_velocity

SHAPES = {"even": (4, 2, 4, 12), "odd": (4, 1, 4, 10), "few": (4, 1, 2, 6)}
"""24, 10 and 3 tokens: of the last ones, one of four processes gets none."""
PRELOAD = ("apt_core.engine.context_parallel", "torch.distributed.fsdp")


def wan(seed: int = 0, heads: int = 4) -> WanBackbone:
    return tiny_wan(layers=4, seed=seed, num_attention_heads=heads)


def mmdit(seed: int = 0) -> MMDiTBackbone:
    return tiny_mmdit(seed=seed, num_attention_heads=4)


def judge(make, seed: int = 1) -> Discriminator:
    backbone = make(seed)
    return Discriminator(backbone)


def inputs(shape: str, n: int = 2):
    g = torch.Generator().manual_seed(5)
    x, z, noise = (torch.randn(n, *SHAPES[shape], generator=g) for _ in range(3))
    return x, z, noise, torch.randn(n, 5, 10, generator=g), torch.rand(n, generator=g)


def gradients(model: nn.Module, group) -> dict[str, torch.Tensor]:
    """Averaged over the group, as DDP and FSDP2 do it. All of them must be there."""
    out = {}
    for name, p in model.named_parameters():
        out[name] = p.grad.clone()
        if group:
            dist.all_reduce(out[name], group=group)
            out[name] /= group.size()
    return out


def velocity(make, shape, group, checkpointing=False, compiled=False):
    model = make()
    if group:
        enable(model, group)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    x, target, _, text, t = inputs(shape)
    x.requires_grad_()
    v = predict_velocity(model, x, t, text)
    ((v - target) ** 2).mean().backward()
    return {"velocity": v, "dx": x.grad, **gradients(model, group)}


def taps(make, shape, group):
    model = make()
    model.drop_output_head()
    model.keep_blocks(3)
    if group:
        enable(model, group)
    x, _, _, text, t = inputs(shape)
    x.requires_grad_()
    features = model(x, 1000 * t, text, taps=(1, 3))
    sum(f.square().mean() for f in features).backward()
    return {"first": features[0], "last": features[1], "dx": x.grad, **gradients(model, group)}


def logits(make, shape, group, checkpointing=False):
    model = judge(make)
    if group:
        enable(model, group)
    if checkpointing:
        model.enable_gradient_checkpointing()
    x, _, _, text, t = inputs(shape)
    x.requires_grad_()
    logit = model(x, t, text)
    logit.square().sum().backward()
    return {"logit": logit, "dx": x.grad, **gradients(model, group)}


def both_steps(make, shape, group, mode="separate"):
    generator, discriminator = make(0), judge(make)
    if group:
        enable(generator, group)
        enable(discriminator, group)
    x, z, noise, text, t = inputs(shape)
    metrics = discriminator_backward(discriminator, Objective.paper("video"), x, z, text, t, noise, mode=mode)
    of_d = {f"D {name}": g for name, g in gradients(discriminator, group).items()}
    discriminator.zero_grad()
    metrics |= generator_backward(generator, discriminator, Objective.paper("video"), z, text, t)
    assert all(p.grad is None for p in discriminator.parameters())
    return {**metrics, **of_d, **{f"G {name}": g for name, g in gradients(generator, group).items()}}


def roles(make, shape, group):
    """Generator and discriminator as adapters of one base, which alone is enabled or, the second time, the
    discriminator too.
    """
    out = {}
    for count in (1, 2):
        base = add_adapters(
            make(), ["generator", "discriminator"], rank=2
        ).double()  # adapters are fp32 whatever the base is
        for p in (p for name in ("generator", "discriminator") for p in role(base, name).parameters()):
            nn.init.normal_(p, std=0.1)
        generator, discriminator = role(base, "generator"), Discriminator(role(base, "discriminator"))
        discriminator.enable_gradient_checkpointing()
        if group:
            for model in (base, discriminator)[:count]:
                enable(model, group)
        x, z, noise, text, t = inputs(shape)
        discriminator_backward(discriminator, Objective.paper("video"), x, z, text, t, noise)
        out |= {f"{count} D {name}": g for name, g in gradients(discriminator, group).items()}
        out |= generator_backward(generator, discriminator, Objective.paper("video"), z, text, t)
        out |= {f"{count} G {name}": g for name, g in gradients(generator, group).items()}
    return out


CASES = {
    f"velocity {make.__name__} {shape}": partial(velocity, make, shape)
    for make in (wan, mmdit)
    for shape in SHAPES
}
CASES |= {
    f"logits {make.__name__} {shape}": partial(logits, make, shape)
    for make in (wan, mmdit)
    for shape in SHAPES
}
CASES |= {f"taps {make.__name__}": partial(taps, make, "odd") for make in (wan, mmdit)}
CASES |= {
    f"both steps {make.__name__} {mode}": partial(both_steps, make, "odd", mode=mode)
    for make in (wan, mmdit)
    for mode in ("batched", "two_pass")
}
CASES |= {f"roles {make.__name__}": partial(roles, make, "odd") for make in (wan, mmdit)}
CASES |= {
    "velocity checkpointed": partial(velocity, wan, "odd", checkpointing=True),
    "logits checkpointed": partial(logits, mmdit, "odd", checkpointing=True),
    "velocity compiled": partial(velocity, wan, "odd", compiled=True),
}


def compute_all(group, out):
    with double():
        results = {
            name: {key: value.detach() for key, value in case(group).items()} for name, case in CASES.items()
        }
    torch.save(results, out / f"{group.rank()}.pt")


def assert_equal(found, expected):
    """To a millionth of each tensor's largest value."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-6 * value.abs().max(), key


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start(request.param, compute_all, folder, preload=PRELOAD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name, found):
    with double():
        expected = CASES[name](None)
    for results in found:
        assert_equal(results[name], expected)


def sharded_steps(group, out):
    """Two samples on 2 x 2 processes, G and D sharded over all four of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    everyone, policy = init_device_mesh("cpu", (4,)), MixedPrecisionPolicy(cast_forward_inputs=False)
    with double():
        generator, discriminator = wan(), judge(wan)
        for model in (generator, discriminator):
            enable(model, mesh["cp"].get_group())
            model.enable_gradient_checkpointing()
        for module in (
            *generator.blocks,
            generator,
            *discriminator.backbone.blocks,
            discriminator.backbone,
            discriminator,
        ):
            fully_shard(module, mesh=everyone, mp_policy=policy)
        sample = mesh["dp"].get_local_rank()
        x, z, noise, text, t = (value[sample : sample + 1] for value in inputs("odd"))
        objective = Objective.paper("video")
        discriminator_backward(discriminator, objective, x, z, text, t, noise, mode="two_pass")
        results = {f"D {name}": p.grad for name, p in discriminator.named_parameters()}
        discriminator.zero_grad()
        generator_backward(generator, discriminator, objective, z, text, t)
        results |= {f"G {name}": p.grad for name, p in generator.named_parameters()}
    assert all(isinstance(g, DTensor) for g in results.values())
    results = {name: g.full_tensor() for name, g in results.items()}
    if group.rank() == 0:
        torch.save(results, out / "sharded.pt")


def test_with_fsdp2_over_two_samples_of_two_processes_each(tmp_path):
    start(4, sharded_steps, tmp_path, preload=PRELOAD)
    with double():
        expected = both_steps(wan, "odd", None)
    assert_equal(
        torch.load(tmp_path / "sharded.pt"),
        {name: value for name, value in expected.items() if name[:2] in ("D ", "G ")},
    )


def refuse(group):
    with pytest.raises(
        AptError, match=r"^4 attention heads .* 3 context-parallel processes: use one of 1, 2, 4\.$"
    ):
        enable(wan(), group)
    model = wan()
    model_of_three = wan(heads=3)
    enable(model_of_three, group)
    with pytest.raises(AptError, match="one time per sample"):
        model_of_three(torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 4), torch.zeros(1, 5, 10))
    assert model.split is None and model_of_three.split.size == 3


def test_refuses_what_cannot_be_split():
    start(3, refuse, preload=PRELOAD)
