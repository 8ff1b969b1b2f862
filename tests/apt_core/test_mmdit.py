import copy
import inspect

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from tiny_models import MMDIT, tiny_mmdit

from apt_core.errors import AptError
from apt_core.loading.mmdit_files import load_mmdit, save_mmdit
from apt_core.method.discriminator import Discriminator
from apt_core.method.generator import one_step
from apt_core.method.objectives import MODES, Objective, discriminator_backward, generator_backward
from apt_core.models.lora import add_adapters, load_lora, merged_state, role, save_lora
from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.wan import predict_velocity


def mmdit(layers=4, seed=0):
    model = tiny_mmdit(layers, seed)
    with torch.no_grad():
        for p in model.parameters():  # norms at 1 would hide mistakes
            p.add_(0.05 * torch.randn_like(p))
    return model


def close(found, expected):
    """In fp64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def doubles(values):
    return (value.double() for value in values)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


NAMES = {
    "patch_embedding": "img_in",
    "text_norm": "txt_norm",
    "text_embedding": "txt_in",
    "time_embedder": "time_text_embed.timestep_embedder",
    "modulation_out": "norm_out.linear",
    "proj_out": "proj_out",
}
STREAMS = {
    "visual": {
        "modulation": "img_mod.1",
        "to_out": "attn.to_out.0",
        "mlp.0": "img_mlp.net.0.proj",
        "mlp.2": "img_mlp.net.2",
    }
    | {n: f"attn.{n}" for n in ("to_q", "to_k", "to_v", "norm_q", "norm_k")},
    "text": {
        "modulation": "txt_mod.1",
        "to_out": "attn.to_add_out",
        "mlp.0": "txt_mlp.net.0.proj",
        "mlp.2": "txt_mlp.net.2",
    }
    | {f"to_{x}": f"attn.add_{x}_proj" for x in "qkv"}
    | {f"norm_{x}": f"attn.norm_added_{x}" for x in "qk"},
}


def stock_of(model):
    """diffusers' dual-stream transformer with the weights of ours."""
    size = {name: MMDIT[name] for name in ("num_attention_heads", "attention_head_dim", "axes_dims_rope")}
    stock = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=len(model.blocks), joint_attention_dim=10, **size
    )
    state = stock.state_dict()
    for key, value in model.state_dict().items():
        module, leaf = key.rsplit(".", 1)
        if module.startswith("blocks."):
            _, i, stream, layer = module.split(".", 3)
            name = f"transformer_blocks.{i}.{STREAMS[stream][layer]}.{leaf}"
        else:
            top, dot, rest = module.partition(".")
            name = f"{NAMES[top]}{dot}{rest}.{leaf}"
        value = value.flatten(1) if key == "patch_embedding.weight" else value
        state[name][: len(value)] = value  # the last text modulation is shorter in ours
    stock.load_state_dict(state)
    return stock


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 6, 10)])
def test_against_diffusers_dual_stream_transformer(double, size):
    torch.manual_seed(1)
    model = mmdit().double()
    stock = stock_of(model).double()
    f, h, w = size
    x, text, t = doubles((torch.randn(2, 4, f, h, w), torch.randn(2, 5, 10), torch.tensor([1000.0, 437.5])))
    packed = (
        x.unflatten(4, (w // 2, 2))
        .unflatten(3, (h // 2, 2))
        .permute(0, 2, 3, 5, 1, 4, 6)
        .flatten(4)
        .flatten(1, 3)
    )
    # up to diffusers 0.36
    lengths = (
        {"txt_seq_lens": [5, 5]} if "txt_seq_lens" in inspect.signature(stock.forward).parameters else {}
    )
    with torch.no_grad():
        expected = stock(
            packed, text, timestep=t / 1000, img_shapes=[[(f, h // 2, w // 2)]] * 2, **lengths
        ).sample
        found = model(x, t, text).sample
    unpacked = (
        expected.unflatten(1, (f, h // 2, w // 2))
        .unflatten(4, (4, 2, 2))
        .permute(0, 4, 1, 2, 5, 3, 6)
        .reshape(x.shape)
    )
    torch.testing.assert_close(found, unpacked, rtol=0, atol=1e-6)  # both have tables of sines in fp32
    assert found.std() > 0.1


def test_size_of_the_papers_shape():
    with torch.device("meta"):
        model = MMDiTBackbone()
    assert (
        len(model.blocks) == 36 and model.config.num_attention_heads * model.config.attention_head_dim == 2496
    )
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert block == 36 * 2496**2 + 30 * 2496 + 4 * 104
    assert sum(p.numel() for p in model.parameters()) == 8_019_454_872


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("taps", [(1, 2, 4), (2,), (4,)])
def test_taps_are_the_full_forwards_inner_states(batch, checkpointing, taps):
    x, _, text, t, *_ = batch()
    model = mmdit()
    reference = copy.deepcopy(model)
    seen, calls = {}, [0] * 4
    for i, block in enumerate(reference.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out[0]))
    reference(x, 1000 * t, text)
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _m, _i, i=i: calls.__setitem__(i, calls[i] + 1))
    if checkpointing:
        model.enable_gradient_checkpointing()
    features = model(x, 1000 * t, text, taps=taps)
    assert calls == [1] * taps[-1] + [0] * (4 - taps[-1])
    assert [f.shape for f in features] == [(2, 12, 24)] * len(taps)
    for tap, feature in zip(taps, features):
        assert torch.equal(feature, seen[tap])
    sum((f * torch.arange(24)).sum() for f in features).backward()
    sum((seen[tap] * torch.arange(24)).sum() for tap in taps).backward()
    expected, got = grads(reference), grads(model)
    assert expected.keys() == got.keys() and expected
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not checkpointing or sum(calls) > taps[-1]


def test_checkpointing_changes_nothing(batch):
    x, _, text, *_ = batch()
    results = []
    for checkpointing in (False, True):
        model = mmdit()
        if checkpointing:
            model.enable_gradient_checkpointing()
        x_hat = one_step(model, x, text)
        x_hat.square().mean().backward()
        results.append([x_hat.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(g.any() for g in results[0])  # no idle weights in the generator


def test_one_step_and_fp32_time(batch):
    x, _, text, *_ = batch()
    model = mmdit()
    with torch.no_grad():
        assert torch.equal(
            one_step(model, x, text), x - model(x, torch.full((2,), 1000.0), text, return_dict=False)[0]
        )
        exact = predict_velocity(model, x, torch.tensor([0.701, 0.5]), text)
        assert (exact - predict_velocity(model, x, torch.tensor([0.7, 0.5]), text))[0].abs().max() > 1e-5
        seen = []
        model.to(torch.bfloat16).timesteps_proj.register_forward_pre_hook(
            lambda _m, args: seen.append(args[0])
        )
        rounded = predict_velocity(model, x, torch.tensor([0.701, 0.5]), text)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == pytest.approx([701.0, 500.0], abs=1e-3)
    assert rounded.dtype == torch.float32 and (rounded - exact).norm() / exact.norm() < 0.03


def test_every_input_matters(batch):
    x, other, text, t, *_ = batch()
    model = mmdit()
    with torch.no_grad():
        base = model(x, 1000 * t, text).sample
        frames = model(x.flip(2), 1000 * t, text).sample.flip(2)  # positions, not only contents
        for changed in (
            model(other, 1000 * t, text).sample,
            model(x, 1000 - 1000 * t, text).sample,
            model(x, 1000 * t, text.flip(0)).sample,
            frames,
        ):
            assert ((base - changed).abs().amax((1, 2, 3, 4)) > 1e-3).all()


@pytest.mark.parametrize("taps", [(), (0, 1), (2, 1), (1, 1), (1, 5)])
def test_bad_taps(batch, taps):
    x, _, text, t, *_ = batch()
    with pytest.raises(AptError):
        mmdit()(x, 1000 * t, text, taps=taps)


def test_bad_axes():
    with pytest.raises(AptError, match="104"):
        MMDiTBackbone(axes_dims_rope=(16, 56, 56))


@pytest.mark.parametrize("fractions", [(4 / 9, 13 / 18, 1.0), (1 / 4, 1 / 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_discriminator_has_no_idle_parameters(batch, fractions, checkpointing):
    x, _, text, t, *_ = batch()
    d = Discriminator(mmdit(), fractions)
    if checkpointing:
        d.enable_gradient_checkpointing()
    logits = d(x, t, text)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    logits.sum().backward()
    assert [n for n, p in d.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert len(d.backbone.blocks) == d.backbone.config.num_layers == d.taps[-1]
    with pytest.raises(AptError, match="taps"):
        d.backbone(x, 1000 * t, text)


def test_cutting_the_depth_leaves_the_taps_alone(double, batch):
    x, _, text, t, *_ = doubles(batch())
    model = mmdit().double()
    before = model(x, 1000 * t, text, taps=(1, 2))
    model.keep_blocks(2)
    for a, b in zip(before, model(x, 1000 * t, text, taps=(1, 2)), strict=True):
        close(a, b)


def test_discriminator_modes_and_the_generator_step(double, batch):
    real, fake, text, t, noise, _ = doubles(batch())
    results = []
    for mode in MODES:
        torch.manual_seed(3)
        d = Discriminator(mmdit(seed=3)).double()
        metrics = discriminator_backward(d, Objective.paper("video"), real, fake, text, t, noise, mode=mode)
        results.append((metrics, grads(d)))
    for metrics, gradients in results[1:]:
        for name, value in results[0][0].items():
            close(metrics[name], value)
        for name, value in results[0][1].items():
            close(gradients[name], value)
    generator = mmdit().double()
    metrics = generator_backward(generator, d, Objective.paper("video"), fake, text, t)
    assert metrics["grad_norm"] > 0 and all(p.grad.any() for p in generator.parameters())


def test_roles_on_one_mmdit(double, batch, tmp_path):
    x, z, text, t, *_ = doubles(batch())
    base = add_adapters(mmdit(), ["generator", "discriminator"], rank=2)
    with torch.no_grad():
        for name in ("generator", "discriminator"):
            for p in role(base, name).parameters():
                p.normal_(std=0.1)
    base.double()
    generator, d = (
        role(base, "generator"),
        Discriminator(role(base, "discriminator"), (1 / 4, 1 / 2)).double(),
    )
    own = MMDiTBackbone.from_config(base.config).double()
    own.load_state_dict(merged_state(base, "generator"), strict=True)
    close(one_step(generator, z, text), one_step(own, z, text))
    d.enable_gradient_checkpointing()
    d(one_step(generator, z, text), t, text).sum().backward()
    for network in (generator, d):
        assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    before = one_step(generator, z, text)
    save_lora(tmp_path / "lora.safetensors", base, "generator", {})
    with torch.no_grad():
        for p in generator.parameters():
            p.zero_()
    load_lora(tmp_path / "lora.safetensors", base, "generator")
    assert torch.equal(one_step(generator, z, text), before)


def test_file_round_trip(same, batch, tmp_path):
    x, _, text, *_ = doubles(batch())
    model, path = mmdit(), tmp_path / "m.safetensors"
    save_mmdit(path, model, model.config, {"phase": "video"})
    loaded = load_mmdit(path)
    assert loaded.config.axes_dims_rope == [4, 4, 4] and loaded.config.num_layers == 4
    same(loaded, model, lambda model: one_step(model, x, text))
    assert {p.device.type for p in load_mmdit(path, device="meta").parameters()} == {"meta"}
    state = model.state_dict()
    del state["blocks.2.text.to_q.weight"]
    with pytest.raises(AptError, match="blocks.2.text.to_q.weight"):
        save_mmdit(path, state, model.config, {})
    model.save_pretrained(tmp_path / "folder")
    same(MMDiTBackbone.from_pretrained(tmp_path / "folder"), model, lambda model: one_step(model, x, text))
