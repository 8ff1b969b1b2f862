"""The same change in every form of LoRA file merges to the same weights, also by diffusers and PEFT."""

import pytest
import torch
from diffusers import WanPipeline
from diffusers.utils.peft_utils import get_peft_kwargs
from lora_writers import BY_DIFFUSERS, FORMS, KOHYA, close, factors, reference, state_of
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from apt_core.errors import NotFinite
from apt_core.models.lora_files import (
    Delta,
    merge,
    official_shapes,
    read_lora,
    read_lora_for,
)

# diffusers 0.36 scales the layers of one rank by that of another where a file has two and no alpha.
READS_TWO_RANKS = bool(get_peft_kwargs({"a": 2, "b": 2, "c": 4}, None, {})["alpha_pattern"])
RANKS_OF_DIFFUSERS = (2, 4) if READS_TWO_RANKS else (2, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_to_the_same_weights(wan, tmp_path, form, dtype):
    model, path = wan().double(), tmp_path / "lora.safetensors"
    change = factors(model, outside=True)
    if dtype == torch.float8_e5m2:  # two bits of fraction
        change = {
            layer: (down.sign() / 2, up.sign() / 4, alpha) for layer, (down, up, alpha) in change.items()
        }
    expected = reference(model, change)
    save_file({key: value.to(dtype) for key, value in FORMS[form](change).items()}, path)
    lora = read_lora(path)
    assert lora.form == form.partition(",")[0] and set(lora.ranks.values()) == {2, 4}
    assert sorted(lora.targets) == sorted(f"{layer}.weight" for layer in change) and len(change) == 36
    lora.check(official_shapes(model))
    close(state_of(merge(model, lora.load())), expected)


@pytest.mark.parametrize("form", BY_DIFFUSERS)
def test_stock_diffusers_reads_the_same(wan, stock, tmp_path, form):
    change = factors(wan(), ranks=RANKS_OF_DIFFUSERS)
    save_file(FORMS[form](change), tmp_path / "lora.safetensors")
    pipeline = WanPipeline(None, None, None, None, transformer=stock().double())
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours = merge(wan().double(), read_lora(tmp_path / "lora.safetensors").load())
    close(state_of(ours), reference(wan(), change))
    close(state_of(pipeline.transformer), reference(wan(), change))


def adapted(stock, **config):
    """A stock transformer with PEFT's adapters, all of whose weights are random."""
    model = get_peft_model(stock().double(), LoraConfig(**config))
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape, generator=g) / 4).double()
    return model


PEFT_SETTINGS = {
    "alpha": dict(r=4, lora_alpha=6),
    "default alpha": dict(r=4),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "patterns": dict(
        r=4, lora_alpha=6, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn1.to_q": 5, "1.attn2.to_k": 9}
    ),
    "bias": dict(r=2, lora_alpha=6, lora_bias=True),
}


@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_what_peft_saves_is_what_peft_merges(wan, stock, tmp_path, settings):
    model = adapted(stock, target_modules=["to_q", "to_k", "ffn.net.2"], **PEFT_SETTINGS[settings])
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert (lora.form, lora.alpha) == ("PEFT", "in adapter_config.json") and len(lora.ranks) == 15
    ours = state_of(merge(wan().double(), lora.load()))
    close(ours, {name: value.double() for name, value in state_of(model.merge_and_unload()).items()})
    assert sum(not torch.equal(ours[name], value.double()) for name, value in state_of(wan()).items()) == len(
        lora.targets
    )


@pytest.mark.parametrize("how", ["pipeline", "model"])
def test_what_diffusers_saves_carries_its_alpha(wan, stock, tmp_path, how):
    model = stock()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_v": 2})
    model.add_adapter(config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    if how == "model":
        model.save_lora_adapter(tmp_path)
    else:
        about = model.peft_config["default"].to_dict()
        WanPipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(model), transformer_lora_adapter_metadata=about
        )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert (
        lora.form == ("no prefix" if how == "model" else "diffusers")
        and lora.alpha == "in lora_adapter_metadata"
    )
    found = {layer: lora.load()[f"{layer}.weight"].scale for layer in lora.ranks}
    assert (
        found == {layer: (2 if layer.endswith("cross_attn.v") else 6) / 4 for layer in lora.ranks}
        and len(found) == 12
    )
    model.double().fuse_lora()
    model.unload_lora()
    close(state_of(merge(wan().double(), lora.load())), state_of(model))


def test_whole_differences_and_biases(wan, tmp_path):
    """As LightX2V and LoRA extractors write them, beside factors; the bias of lora_B is scaled as its factors
    are."""
    model, path = wan().double(), tmp_path / "lora.safetensors"
    shapes, state = official_shapes(model), {name: value.clone() for name, value in state_of(model).items()}
    g = torch.Generator().manual_seed(1)
    whole = {
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.modulation.diff": "head.modulation",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "head.head.diff": "head.head.weight",
        "blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
        "blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff_b": "head.head.bias",
        "blocks.2.self_attn.norm_q.diff": "blocks.2.self_attn.norm_q.weight",
        "blocks.2.ffn.0.diff": "blocks.2.ffn.0.weight",
    }
    tensors = {key: torch.randn(shapes[name], generator=g) for key, name in whole.items()}
    for key, name in whole.items():
        state[name] += tensors[key].double()
    layer = "blocks.2.ffn.0"  # has factors, a bias of lora_B and a difference
    down, up, bias = (torch.randn(shape, generator=g) for shape in ((3, 24), (32, 3), (32,)))
    tensors |= {
        f"{layer}.lora_A.weight": down,
        f"{layer}.lora_B.weight": up,
        f"{layer}.lora_B.bias": bias,
        f"{layer}.alpha": torch.tensor([6]),
    }
    state[f"{layer}.weight"] += up.double() @ down.double() * 2
    state[f"{layer}.bias"] += bias.double() * 2
    # as a convolution's are saved
    down, up = (
        torch.randn(2, 4, 1, 2, 2, generator=g),
        torch.randn(24, 2, 1, 1, 1, generator=g),
    )
    tensors |= {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    state["patch_embedding.weight"] += torch.einsum(
        "or,ricde->oicde", up[..., 0, 0, 0].double(), down.double()
    )
    save_file({f"diffusion_model.{key}": value for key, value in tensors.items()}, path)
    lora = read_lora(path)
    assert set(lora.targets) == {*whole.values(), f"{layer}.bias"} and lora.ranks == {
        layer: 3,
        "patch_embedding": 2,
    }
    assert lora.alpha == "in the file, elsewhere taken as the rank"
    lora.check(official_shapes(model))
    close(state_of(merge(model, lora.load())), state)


def test_attention_alone(wan, tmp_path):
    change = factors(wan(), layers=("attn.q", "attn.v"))
    save_file(KOHYA(change), tmp_path / "lora.safetensors")
    lora = read_lora_for(tmp_path / "lora.safetensors", wan(), "tiny")
    assert len(lora.targets) == 12 and set(lora.ranks.values()) == {2} and lora.alpha == "in the file"
    close(state_of(merge(wan().double(), lora.load())), reference(wan(), change))


def test_sums_are_made_in_fp32(wan):
    g = torch.Generator().manual_seed(2)
    up, down, weight = (torch.randn(shape, generator=g) for shape in ((24, 3), (3, 24), (24, 24)))
    delta = Delta(up=up, down=down, scale=1 / 3)
    assert torch.equal(delta.add_to(weight), weight + up @ down * (1 / 3))
    small = weight.bfloat16()
    assert torch.equal(delta.add_to(small), (small.float() + up @ down * (1 / 3)).bfloat16())
    assert Delta(full=up).add_to(torch.ones(24, 3, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(
        NotFinite,
        match=r"^with the LoRA added, blocks.0.self_attn.q.weight has weights beyond what fp16 can hold: "
        r"use bf16 or fp32\.$",
    ):
        merge(
            wan().half(),
            {
                "blocks.0.self_attn.q.weight": Delta(
                    up=torch.full((24, 1), 300.0), down=torch.full((1, 24), 300.0)
                )
            },
        )
