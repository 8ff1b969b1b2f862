"""`inspect`, `export` and `generate` with LoRA files of other programs."""

import math

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from apt_core.errors import AptError
from apt_core.files.keys import transformer_to_official
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.sources import SHIPPED
from apt_core.models.lora import add_adapters, role, save_lora
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
        "changes": f"{4 * blocks} weights in {blocks} blocks, 1 outside: cross_attn.q, cross_attn.v, "
        f"head.head.bias, self_attn.q, self_attn.v",
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
        f"(128, 128)"
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
    with pytest.raises(AptError, match=r"is not a LoRA file: leave --base away\.$"):
        inspect(SHIPPED["base"], base="mini")


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
