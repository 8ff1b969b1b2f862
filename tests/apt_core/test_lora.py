import copy

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch.utils.checkpoint import checkpoint

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_metadata
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.method.discriminator import Discriminator
from apt_core.method.ema import Ema
from apt_core.method.generator import one_step
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward
from apt_core.method.optim import make_rmsprop
from apt_core.models.lora import (
    adapter_state,
    add_adapters,
    load_lora,
    lora_state,
    merged_state,
    role,
    save_lora,
)
from apt_core.models.wan import WanBackbone

ROLES = ("generator", "discriminator")


@pytest.fixture
def shared(wan):
    """Factory: a tiny Wan with adapters for both roles whose weights are not zero."""

    def make(roles=ROLES, rank=3, alpha=6.0, targets=None, fill=True, **kw):
        model = add_adapters(wan(**kw), roles, rank, alpha, targets)
        if fill:
            g = torch.Generator().manual_seed(9)
            with torch.no_grad():
                for name in roles:
                    for p in role(model, name).parameters():
                        p.copy_(0.2 * torch.randn(p.shape, generator=g))
        return model

    return make


def merged(model, name, cls=WanBackbone):
    """A model of its own that holds what the role computes with."""
    own = cls.from_config(model.config).to(next(model.parameters()).dtype)
    own.load_state_dict(merged_state(model, name), strict=True)
    return own.requires_grad_(True)


def grads(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def close(a, b):
    """In fp64."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def doubles(values):
    return (value.double() for value in values)


def test_fresh_adapters_change_nothing(shared, wan, batch):
    x, _, text, t, *_ = batch()
    model, plain = shared(fill=False), wan()
    for name in (*ROLES, None, "base"):
        assert torch.equal(one_step(role(model, name), x, text), one_step(plain, x, text))
        for a, b in zip(
            role(model, name)(x, 1000 * t, text, taps=(1, 3)), plain(x, 1000 * t, text, taps=(1, 3))
        ):
            assert torch.equal(a, b)
    assert {
        k: v for k, v in model.state_dict().items() if ".adapters." not in k
    }.keys() == plain.state_dict().keys()


def test_each_role_is_its_own_merged_model(double, shared, wan, batch):
    x, _, text, t, *_ = doubles(batch())
    model = shared().double()
    outputs = []
    for name in (*ROLES, None):
        own = merged(model, name)
        outputs.append(one_step(role(model, name), x, text))
        close(outputs[-1], one_step(own, x, text))
        for a, b in zip(
            role(model, name)(x, 1000 * t, text, taps=(2, 3)), own(x, 1000 * t, text, taps=(2, 3))
        ):
            close(a, b)
    assert torch.equal(outputs[2], one_step(wan().double(), x, text))
    assert (outputs[0] - outputs[1]).abs().mean() > 0.01 < (outputs[0] - outputs[2]).abs().mean()


def test_the_merge_by_hand(double, shared, wan):
    model, plain = shared().double(), wan().double().state_dict()
    adapters, whole = adapter_state(model, "generator"), merged_state(model, "generator")
    layer = "blocks.1.attn2.to_k"
    assert adapters[f"{layer}.lora_A.weight"].shape == (3, 24)
    by_hand = (
        plain[f"{layer}.weight"]
        + 6 / 3 * adapters[f"{layer}.lora_B.weight"] @ adapters[f"{layer}.lora_A.weight"]
    )
    close(whole[f"{layer}.weight"], by_hand)
    touched = {key.removesuffix(".lora_A.weight") for key in adapters if key.endswith("lora_A.weight")}
    assert len(touched) == 30  # 10 linear layers in each of 3 blocks
    for key, value in plain.items():
        assert torch.equal(whole[key], value) == (key.removesuffix(".weight") not in touched), key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_calls_of_all_roles_in_one_graph(double, shared, batch, checkpointing):
    """The classic trap: a block recomputed in the backward pass must play the role of its call, not the last
    or no role.
    """
    x, other, text, t, *_ = doubles(batch())
    model = shared().double()
    views = {name: role(model, name) for name in (*ROLES, None)}
    owns = {name: merged(model, name) for name in (*ROLES, None)}
    owns[None].requires_grad_(False)
    if checkpointing:
        views["generator"].enable_gradient_checkpointing()

    def total(networks):
        z = x.clone().requires_grad_()
        made = one_step(networks["generator"], z, text)
        seen = networks["discriminator"](made, 1000 * t, text, taps=(1, 3))
        again = one_step(networks[None], made, text) + one_step(networks["generator"], other, text)
        more = networks["discriminator"](again, 1000 * t, text, taps=(2,))
        loss = sum((f * torch.arange(24)).square().mean() for f in (*seen, *more))
        loss.backward()
        return loss.detach(), z.grad

    (loss, z_grad), (own_loss, own_z_grad) = total(views), total(owns)
    close(loss, own_loss)
    close(z_grad, own_z_grad)
    for name in ROLES:
        expected = grads(owns[name])
        for layer, adapter in views[name].adapters().items():
            # d/dB of W + s B A is s G A^T, d/dA is s B^T G.
            g = expected[f"{layer}.weight"]
            by_a = 2 * adapter.lora_B.weight.detach().T @ g
            by_b = 2 * g @ adapter.lora_A.weight.detach().T
            close(adapter.lora_A.weight.grad, by_a)
            close(adapter.lora_B.weight.grad, by_b)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


def test_a_foreign_checkpoint_function_takes_the_role_along(shared, batch):
    x, _, text, *_ = batch()
    results = []
    for function in (
        None,
        lambda block, tokens, *rest: checkpoint(lambda x: block(x, *rest), tokens, use_reentrant=False),
    ):
        model = shared()
        generator = role(model, "generator")
        if function:
            generator.enable_gradient_checkpointing(function)
        loss = (
            one_step(generator, x, text).square().mean()
            + one_step(role(model, "discriminator"), x, text).square().mean()
        )
        loss.backward()
        results.append([p.grad for name in ROLES for p in role(model, name).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_block_called_outside_of_a_role_is_an_error(shared, batch):
    x, _, text, t, *_ = batch()
    model = shared()
    with pytest.raises(RuntimeError, match="role"):
        model(x, 1000 * t, text)
    with pytest.raises(AptError):
        role(model, "generator")(x, 1000 * t, text, taps=(9,))
    with pytest.raises(RuntimeError, match="role"):  # the failed call left no role behind
        model(x, 1000 * t, text)


@pytest.mark.parametrize("mode, checkpointing", [("batched", True), ("separate", False), ("two_pass", True)])
def test_training_both_roles(double, shared, batch, mode, checkpointing):
    """Against two models of their own: the same logits, losses and generated sample; and the base stays as it
    was to the last bit.
    """
    real, z, text, t, noise, _ = doubles(batch())
    model = shared().double()
    before = copy.deepcopy(model.state_dict())
    generator, d = role(model, "generator"), Discriminator(role(model, "discriminator")).double()
    own = Discriminator(merged(model, "discriminator")).double()
    own.heads.load_state_dict(d.heads.state_dict())
    own.logit.load_state_dict(d.logit.state_dict())
    expected = [
        discriminator_backward(
            own,
            Objective.paper("video"),
            real,
            one_step(merged(model, "generator"), z, text),
            text,
            t,
            noise,
            mode=mode,
        ),
        generator_backward(merged(model, "generator"), own, Objective.paper("video"), z, text, t),
    ]
    if checkpointing:
        d.enable_gradient_checkpointing()
    optimizers = [make_rmsprop(network.parameters(), 1e-2) for network in (generator, d)]
    for update in range(2):
        fake = one_step(generator, z, text).detach()
        found = [discriminator_backward(d, Objective.paper("video"), real, fake, text, t, noise, mode=mode)]
        assert all(p.grad is None for p in generator.parameters())
        assert [n for n, p in d.named_parameters() if p.grad is None or not p.grad.any()] == []
        if update:
            optimizers[1].step()
        optimizers[1].zero_grad()
        found.append(generator_backward(generator, d, Objective.paper("video"), z, text, t))
        assert [n for n, p in generator.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert all(p.grad is None for p in d.parameters())
        if update == 0:
            for a, b in zip(found, expected):
                assert a.keys() == b.keys()
                for name in a:
                    close(a[name], b[name])
        optimizers[0].step()
        optimizers[0].zero_grad()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if ".adapters." not in key)
    for name in ROLES:
        assert all(not torch.equal(before[key], after[key]) for key in before if f".adapters.{name}." in key)


def test_discriminator_has_no_idle_adapters_and_the_generator_keeps_its_own(shared, batch):
    x, _, text, t, *_ = batch()
    model = shared(targets=["attn1.to_q", "ffn.net.2", "proj_out"], layers=6)
    before = one_step(role(model, "generator"), x, text)
    d = Discriminator(role(model, "discriminator"), fractions=(1 / 3, 2 / 3))
    d(x, t, text).sum().backward()
    idle = [n for n, p in d.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert set(d.backbone.adapters()) == {
        f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn1.to_q", "ffn.net.2")
    }
    assert d.backbone.config.num_layers == 4 and model.config.num_layers == len(model.blocks) == 6
    assert len(role(model, "generator").adapters()) == 13
    assert torch.equal(one_step(role(model, "generator"), x, text), before)
    # gone for good, from any view
    assert set(role(model, "discriminator").adapters()) == set(d.backbone.adapters())
    with pytest.raises(AptError, match="taps"):
        d.backbone(x, 1000 * t, text)


def test_ema_of_a_role_and_copies_between_roles(shared):
    model = shared()
    generator = role(model, "generator")
    ema = Ema(generator, 0.5)
    start = copy.deepcopy(generator.state_dict())
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(1.0)
    ema.update(generator)
    ema.copy_to(role(model, "discriminator"))  # both roles' names are the layers'
    for key, value in adapter_state(model, "discriminator").items():
        # numbers below 2, rounded twice
        torch.testing.assert_close(value, start[key] + 0.5, rtol=0, atol=2**-22)


def test_bf16_base_and_fp32_adapters(shared, batch):
    x, _, text, *_ = batch()
    model = shared()
    expected = one_step(role(model, "generator"), x, text)
    for name, p in model.named_parameters():
        if ".adapters." not in name:
            p.data = p.data.bfloat16()
    generator = role(model, "generator")
    result = one_step(generator, x, text)
    assert (result - expected).norm() / expected.norm() < 0.02
    result.square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in generator.parameters())
    assert merged_state(model, "generator")["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


def test_a_compiled_block(double, shared, batch):
    x, _, text, t, *_ = doubles(batch())
    results = []
    for compiled in (False, True):
        model = shared().double()
        if compiled:
            model.blocks[1].compile(backend="eager", fullgraph=True)
            role(model, "generator").enable_gradient_checkpointing()
        made = one_step(role(model, "generator"), x, text)
        sum(
            f.square().mean() for f in role(model, "discriminator")(made, 1000 * t, text, taps=(1, 3))
        ).backward()
        results.append([made.detach()] + [p.grad for name in ROLES for p in role(model, name).parameters()])
    for a, b in zip(*results, strict=True):
        close(a, b)


TARGETS = [
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_v",
    "ffn.net.0.proj",
    "ffn.net.2",
    "proj_out",
]
TARGETS += [
    "time_embedder.linear_1",
    "time_embedder.linear_2",
    "time_proj",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
]


@pytest.mark.parametrize("targets", [None, TARGETS])
def test_diffusers_loads_the_file(double, shared, batch, tmp_path, targets):
    """What is compared is in fp64, the file in fp32; doubling loses nothing, nor does alpha / rank = 2 within
    the file.
    """
    x, _, text, t, *_ = doubles(batch())
    model = shared(targets=targets).double()
    path = tmp_path / "lora.safetensors"
    save_lora(path, model, "generator", {"base": "tiny", "phase": "video", "modelspec.title": "Tiny"})
    assert read_metadata(path) == {
        "format": 1,
        "kind": "lora",
        "timestep": 1000,
        "base": "tiny",
        "phase": "video",
        "rank": 3,
    }

    stock = WanTransformer3DModel.from_config(model.config)
    stock.load_state_dict(merged_state(model, None), strict=True)
    pipeline = WanPipeline(None, None, None, None, transformer=stock)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    loaded = [n for n, _ in stock.named_parameters() if "lora_A" in n]
    assert len(loaded) == len(role(model, "generator").adapters())
    with torch.no_grad():
        theirs = stock.double()(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False
        )[0]
        ours = merged(model, "generator")(x, 1000 * t, text, return_dict=False)[0]
        close(theirs, ours)
        assert (ours - role(model, None)(x, 1000 * t, text, return_dict=False)[0]).abs().mean() > 0.01


def test_file_round_trip(double, shared, batch, tmp_path):
    x, _, text, *_ = doubles(batch())
    model, path = shared().double(), tmp_path / "lora.safetensors"
    save_lora(path, model, "generator", {})
    assert all(key.startswith("diffusion_model.blocks.") for key in lora_state(model, "generator"))
    fresh = shared(fill=False, alpha=1.5).double()  # another scale: the file has the old one in it
    load_lora(path, fresh, "generator")
    close(one_step(role(fresh, "generator"), x, text), one_step(role(model, "generator"), x, text))
    assert torch.equal(one_step(role(fresh, "discriminator"), x, text), one_step(role(fresh, None), x, text))
    with pytest.raises(
        AptError, match=r"has rank 3 at .*, but the adapters have 2: take rank 3 \(lora_rank=3\)"
    ):
        load_lora(path, shared(rank=2), "generator")
    few = shared(targets=["to_q"]).double()  # other layers of the file become differences
    load_lora(path, few, "generator")
    close(one_step(role(few, "generator"), x, text), one_step(role(model, "generator"), x, text))
    save_generator(path, merged_state(model, "generator"), model.config, {})
    assert torch.equal(
        load_transformer(path).blocks[0].ffn.net[2].weight,
        merged_state(model, "generator")["blocks.0.ffn.net.2.weight"].to(torch.float32),
    )
    with pytest.raises(AptError, match="not a LoRA"):
        load_lora(path, model, "generator")


def test_a_lora_of_lower_rank_is_where_a_role_begins(double, shared, batch, tmp_path):
    """The sum is the same to the last digits, the further directions add nothing and can learn."""
    x, _, text, *_ = doubles(batch())
    model, path = shared(rank=2, targets=["to_q", "ffn.net.2"]).double(), tmp_path / "lora.safetensors"
    save_lora(path, model, "generator", {}, dtype=torch.float64)
    larger = shared(rank=5, alpha=1.5).double()  # full of numbers
    load_lora(path, larger, "generator")
    close(one_step(role(larger, "generator"), x, text), one_step(role(model, "generator"), x, text))
    one_step(role(larger, "generator"), x, text).square().sum().backward()
    adapters = role(larger, "generator").adapters()
    for layer, adapter in adapters.items():
        began = layer.endswith(("to_q", "ffn.net.2"))
        assert adapter.lora_B.weight[:, :2].any() == began and not adapter.lora_B.weight[:, 2:].any()
        assert adapter.lora_A.weight[2:].any() and adapter.lora_B.weight.grad[:, 2:].any()
    assert len(adapters) > 2 * 2


def test_bad_requests(wan, shared):
    for kw, message in [
        ({"roles": ["base"]}, "base"),
        ({"roles": []}, "roles"),
        ({"roles": ["a", "a"]}, "different"),
        ({"roles": ["a.b"]}, "plain"),
        ({"rank": 0}, "rank"),
        ({"targets": ["to_x"]}, "attn1.to_q"),
    ]:
        with pytest.raises(AptError, match=message):
            shared(**{"fill": False, **kw})
    with pytest.raises(AptError, match="already"):
        add_adapters(shared(), ["more"], 2)
    with pytest.raises(AptError, match="generator"):
        role(shared(), "teacher")
    with pytest.raises(AptError, match="add_adapters"):
        role(wan(), "generator")
