"""What a LoRA changes beside the layers that a role adapts: exact in the role, absent in the others, and in
every file that the role is written to."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.files import keys
from apt_core.method.generator import one_step
from apt_core.models.differences import differences
from apt_core.models.lora import add_adapters, fold, load_lora, lora_state, merged_state, role, save_lora
from apt_core.models.lora_files import merge, read_lora_for

LAYER = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture
def start(wan, tmp_path):
    """A few-step LoRA: factors in and outside of the blocks, differences of a bias, a norm, a modulation
    table, a matrix that has factors too, and a whole one; and the model that it makes."""
    model, g = wan().double(), torch.Generator().manual_seed(0)
    shapes = {keys.transformer_to_official(name): tuple(p.shape) for name, p in model.named_parameters()}
    tensors = {}
    for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "time_projection.1"):
        out, into = shapes[f"{layer}.weight"]
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(2, into, generator=g) / 4
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(out, 2, generator=g) / 4
    for key, name in (
        ("blocks.0.self_attn.q.diff_b", "blocks.0.self_attn.q.bias"),
        ("blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
        ("blocks.1.diff_m", "blocks.1.modulation"),
        ("blocks.1.ffn.0.diff", "blocks.1.ffn.0.weight"),
        ("head.head.diff", "head.head.weight"),
        ("head.head.diff_b", "head.head.bias"),
    ):
        tensors[f"diffusion_model.{key}"] = torch.randn(shapes[name], generator=g) / 4
    path = tmp_path / "start.safetensors"
    save_file(tensors, path)
    merged = merge(wan().double(), read_lora_for(path, model, "the base").load())
    return path, merged


def begun(wan, path):
    model = add_adapters(wan().double(), ("generator", "discriminator"), rank=3, alpha=6.0).double()
    load_lora(path, model, "generator")
    return model


def test_the_role_is_the_merged_model_and_the_others_are_the_base(wan, start, batch):
    path, merged = start
    x, _, text, *_ = (part.double() for part in batch())
    model, plain = begun(wan, path), wan().double()
    torch.testing.assert_close(one_step(role(model, "generator"), x, text), one_step(merged, x, text))
    for other in ("discriminator", None):
        assert torch.equal(one_step(role(model, other), x, text), one_step(plain, x, text))
    assert not torch.allclose(one_step(merged, x, text), one_step(plain, x, text), atol=0.01)
    assert len(differences(model, "generator")) == 7 and not differences(model, "discriminator")
    names = {name for name, _ in role(model, "generator").named_parameters()}
    assert all("lora_" in name for name in names)  # nothing else is trained
    assert model.state_dict().keys() == begun_without(wan).state_dict().keys()


def begun_without(wan):
    return add_adapters(wan().double(), ("generator", "discriminator"), rank=3)


def test_adapters_learn_through_them_with_and_without_checkpointing(wan, start, batch):
    path, _ = start
    x, _, text, *_ = (part.double() for part in batch())
    gradients = []
    for checkpointing in (False, True):
        model = begun(wan, path)
        generator = role(model, "generator")
        if checkpointing:
            generator.enable_gradient_checkpointing()
        one_step(generator, x, text).square().sum().backward()
        gradients.append({name: p.grad for name, p in generator.named_parameters()})
        assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
    assert any(gradient.any() for gradient in gradients[0].values())


def test_every_file_and_network_of_the_role_has_them(wan, start, batch, tmp_path):
    path, merged = start
    x, _, text, *_ = (part.double() for part in batch())
    expected = one_step(merged, x, text)
    model = begun(wan, path)
    state = merged_state(model, "generator")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)

    save_lora(tmp_path / "again.safetensors", model, "generator", {}, torch.float64)
    written = load_file(tmp_path / "again.safetensors")
    assert (
        {f"{LAYER}.diff_b", "diffusion_model.blocks.1.modulation.diff"}
        < written.keys()
        == lora_state(model, "generator").keys()
    )
    again = begun(wan, tmp_path / "again.safetensors")
    torch.testing.assert_close(one_step(role(again, "generator"), x, text), expected)
    whole = merge(wan().double(), read_lora_for(tmp_path / "again.safetensors", wan(), "the base").load())
    torch.testing.assert_close(one_step(whole, x, text), expected)

    save_lora(tmp_path / "none.safetensors", begun_without(wan), "generator", {})
    load_lora(tmp_path / "none.safetensors", again, "generator")  # in the place of the one before
    assert not differences(again, "generator")
    assert torch.equal(one_step(role(again, "generator"), x, text), one_step(wan().double(), x, text))
    assert type(again.proj_out) is torch.nn.Linear

    folded = fold(model, "generator")
    torch.testing.assert_close(one_step(folded, x, text), expected)
    assert (
        folded.state_dict().keys() == wan().state_dict().keys() and type(folded.proj_out) is torch.nn.Linear
    )


def test_in_bf16_a_difference_is_added_in_fp32_and_rounded_once(wan, start):
    path, _ = start
    model = add_adapters(wan().bfloat16(), ("generator",), rank=3)
    load_lora(path, model, "generator")
    for name, change in differences(model, "generator").items():
        assert change.dtype == torch.float32
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        own = module._parameters[leaf]
        assert torch.equal(getattr(module, leaf), own)  # outside of the role
        inside = model.blocks.switch.run("generator", lambda: getattr(module, leaf))
        assert inside.dtype == own.dtype and torch.equal(inside, (own.float() + change).to(own.dtype))


def test_on_meta_their_shapes_are_there(wan, start, tmp_path):
    path, _ = start
    with torch.device("meta"):
        model = add_adapters(wan().to("meta"), ("generator",), rank=3)
    load_lora(path, model, "generator")
    found = differences(model, "generator")
    assert len(found) == 7 and all(value.is_meta for value in found.values())
    assert all(found[name].shape == p.shape for name, p in wan().named_parameters() if name in found)
