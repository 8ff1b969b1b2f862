"""`inspect`, `export` and `generate` with LoRA files of other programs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from apt_core.errors import AptError
from apt_core.files.keys import transformer_to_official
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.sources import SHIPPED
from apt_core.models.lora import add_adapters, merged_state, role, save_lora
from trainer.__main__ import app
from trainer.checkpoints.export import export
from trainer.checkpoints.generate import find_source
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.trained_models import open_generator
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Lora, adversarial_networks


@pytest.fixture(scope="module")
def base():
    return load_backbone(SHIPPED["base"])


@pytest.fixture
def kohya(base, tmp_path):
    """A LoRA of attention alone, ranks 2 and 4, with a difference of one bias, and the weights that it makes
    of the miniature."""
    tensors, state, g = {}, base.state_dict(), torch.Generator().manual_seed(0)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name and name.endswith(("to_q", "to_v")):
            rank, flat = (
                (2 if "attn1" in name else 4),
                "lora_unet_" + transformer_to_official(name).replace(".", "_"),
            )
            down, up = (
                torch.randn(rank, module.in_features, generator=g),
                torch.randn(module.out_features, rank, generator=g),
            )
            tensors |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(1.0),
            }
            state[f"{name}.weight"] = state[f"{name}.weight"] + up @ down / rank
    tensors["lora_unet_head_head.diff_b"] = torch.ones_like(base.proj_out.bias)
    state["proj_out.bias"] = state["proj_out.bias"] + 1
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", state


def test_inspect_says_what_a_lora_is_and_whether_it_fits(base, kohya, tmp_path):
    path, _ = kohya
    blocks = base.config.num_layers
    facts = inspect(path)
    assert facts["what"] == "LoRA" and facts["loads"] == "needs its base: --base PATH compares it with one"
    assert {name: facts[name] for name in ("form", "rank", "alpha", "changes")} == {
        "form": "kohya",
        "rank": "2, 4",
        "alpha": "in the file",
        "changes": (
            f"{4 * blocks} weights in {blocks} blocks, 1 outside: cross_attn.q, cross_attn.v, "
            "head.head.bias, self_attn.q, self_attn.v"
        ),
    }
    assert inspect(path, deep=True, base="mini")["loads"] == f"yes, over {SHIPPED['base']}"
    result = CliRunner().invoke(app, ["inspect", str(path), "--base", "mini"], catch_exceptions=False)
    assert (
        result.exit_code == 0
        and f"{'form':<16} kohya\n" in result.output
        and f"{'loads':<16} yes, over" in result.output
    )

    layer, other = "lora_unet_blocks_0_self_attn_q", tmp_path / "other.safetensors"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(2, 5120), f"{layer}.lora_up.weight": torch.ones(5120, 2)},
        other,
    )
    facts = inspect(other, base="mini")
    assert (facts["rank"], facts["alpha"]) == ("2", "none: taken as the rank")
    assert facts["loads"].startswith(
        f"no: {other} changes blocks.0.self_attn.q.weight by (5120, 5120), but in {SHIPPED['base']} it is "
        "(128, 128)"
    )
    save_file({f"{layer}.lokr_w1": torch.ones(2, 2)}, other)
    facts = inspect(other)
    assert facts["what"] == "LoRA" and facts["loads"].startswith(f"no: {other} is a LoKr")
    save_file({f"{layer}.diff": torch.full((128, 128), math.nan)}, other)
    assert inspect(other, base="mini")["rank"] == "none: whole differences" and inspect(other, base="mini")[
        "loads"
    ].startswith("yes")
    assert inspect(other, deep=True, base="mini")["loads"].startswith(f"no: {other}: {layer}.diff holds NaN")
    assert inspect(path, base=str(tmp_path / "gone"))["loads"].startswith(
        f"no: base {tmp_path / 'gone'} does not exist"
    )
    with pytest.raises(AptError, match=r"is not a LoRA file: leave --base out\.$"):
        inspect(SHIPPED["base"], base="mini")


def test_inspect_believes_a_file_that_says_it_is_a_lora(tmp_path):
    """As training and export do, which then say what is wrong with it."""
    path, apt = tmp_path / "claims.safetensors", {"format": 1, "kind": "lora", "rank": 2}
    save_file({"someone.own.name": torch.ones(2, 128)}, path, {"apt": json.dumps(apt)})
    facts = inspect(path, base="mini")
    assert facts["what"] == "LoRA"
    assert facts["loads"].startswith(f"no: {path}: someone.own.name cannot be placed in a Wan transformer")


def test_a_foreign_lora_is_opened_exported_and_sampled(base, kohya, tmp_path):
    path, state = kohya
    opened = open_generator(path, "mini")
    found = opened.model.state_dict()
    assert opened.base is None and opened.metadata["kind"] == "base" and found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    export(path, tmp_path / "whole.safetensors", dtype="fp32", base="mini")
    again = load_transformer(tmp_path / "whole.safetensors").state_dict()
    assert all(torch.equal(again[name], value) for name, value in found.items())
    with pytest.raises(
        AptError,
        match=r"is a LoRA already, of another form than this trainer's: use it as it is, or --form file\.$",
    ):
        export(path, tmp_path / "l.safetensors", form="lora", base="mini")
    with pytest.raises(AptError, match=r"is a LoRA: add --base PATH"):
        open_generator(path)
    assert find_source(path, "mini") == path  # a pipeline opens it by itself


def test_a_lora_of_our_shape_keeps_its_adapters_in_any_form(base, tmp_path):
    model = add_adapters(load_backbone(SHIPPED["base"]), ["generator"], rank=2)
    for p in role(model, "generator").parameters():
        torch.nn.init.normal_(p)
    save_lora(tmp_path / "ours.safetensors", model, "generator", {"base": "mini", "phase": "video"})
    adapters = role(model, "generator").state_dict()
    tensors = {}
    for name, value in adapters.items():
        layer, side = name.removesuffix(".weight").rsplit(".", 1)
        tensors[f"transformer.{layer}.{side}.weight"] = value
    save_file(tensors, tmp_path / "diffusers.safetensors")
    for name, phase in (("ours", "video"), ("diffusers", None)):
        opened = open_generator(tmp_path / f"{name}.safetensors", "mini")
        found = opened.model.state_dict()
        assert (
            opened.base is not None
            and found.keys() == adapters.keys()
            and opened.metadata.get("phase") == phase
        )
        assert all(torch.equal(found[key], value) for key, value in adapters.items())


def test_training_compares_the_lora_that_it_starts_from_with_the_headers(tmp_path):
    path = tmp_path / "start.safetensors"
    save_file(
        {
            "blocks.0.ffn.0.lora_A.weight": torch.ones(2, 5120),
            "blocks.0.ffn.0.lora_B.weight": torch.ones(9, 2),
        },
        path,
    )

    def load(place, dtype=torch.float32, device="cpu"):
        assert torch.device(device).type == "meta", "a weight was read"
        return load_backbone(place, dtype, device)

    with pytest.raises(
        AptError, match=r"start\.safetensors changes blocks\.0\.ffn\.0\.weight by \(9, 5120\), but in "
    ):
        adversarial_networks(path, SHIPPED["base"], load, World(), Parallel(), Lora(2, None))


def test_a_whole_generator_begins_with_the_merged_lora(base, kohya):
    """In full mode any LoRA is a start, biases and all; the discriminator is the base."""
    path, state = kohya
    networks = adversarial_networks(path, SHIPPED["base"], load_backbone, World(), Parallel())
    found = networks.generator.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    backbone = networks.discriminator.backbone.state_dict()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in backbone.items())
    start = adversarial_networks(
        path, SHIPPED["base"], load_backbone, World(), Parallel(), discriminator_start="start"
    )
    key = "blocks.0.attn1.to_q.weight"
    assert torch.equal(start.discriminator.backbone.state_dict()[key], found[key])


def test_adapters_begin_with_a_lora_of_lower_rank(base, kohya, tmp_path):
    path, state = kohya
    plain = {key: value for key, value in load_file(path).items() if "head" not in key}
    save_file(plain, tmp_path / "plain.safetensors")
    networks = adversarial_networks(
        tmp_path / "plain.safetensors", SHIPPED["base"], load_backbone, World(), Parallel(), Lora(8, 3.0)
    )
    found = merged_state(networks.base, "generator")
    for name, value in state.items():
        expected = base.state_dict()[name] if name == "proj_out.bias" else value
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    untouched = merged_state(networks.base, "discriminator")
    assert all(torch.equal(value, untouched[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    "start, lora, says",
    [
        (
            "plain",
            Lora(3, None),
            r"plain\.safetensors has rank 4 at blocks\.0\.cross_attn\.q, but the adapters "
            r"have 3: take rank 4 \(lora_rank=4\) or more, or a LoRA of lower rank\.$",
        ),
        (
            "whole",
            Lora(8, None),
            r"whole\.safetensors is a whole model, which adapters over .* cannot "
            r"hold: train with mode=full, or give base=.*whole\.safetensors too",
        ),
        (
            "other",
            Lora(8, None),
            r"other\.safetensors changes blocks\.0\.self_attn\.q\.weight by \(5120, 5120\), "
            r"but in .* it is \(128, 128\): give as the base the model .*of width 5120 \(that of the 14B"
            r" models\)",
        ),
        ("other", None, r"other\.safetensors changes blocks\.0\.self_attn\.q\.weight by \(5120, 5120\)"),
    ],
)
def test_a_start_that_cannot_be_is_refused_from_the_headers(base, kohya, tmp_path, start, lora, says):
    path, _ = kohya
    save_file({k: v for k, v in load_file(path).items() if "head" not in k}, tmp_path / "plain.safetensors")
    layer = "lora_unet_blocks_0_self_attn_q"
    wide = {f"{layer}.lora_down.weight": torch.ones(2, 5120), f"{layer}.lora_up.weight": torch.ones(5120, 2)}
    save_file(wide, tmp_path / "other.safetensors")
    save_generator(tmp_path / "whole.safetensors", base, base.config, {})

    def load(place, dtype=torch.float32, device="cpu"):
        assert torch.device(device).type == "meta", "a weight was read"
        return load_backbone(place, dtype, device)

    with pytest.raises(AptError, match=says):
        adversarial_networks(
            tmp_path / f"{start}.safetensors", SHIPPED["base"], load, World(), Parallel(), lora
        )
