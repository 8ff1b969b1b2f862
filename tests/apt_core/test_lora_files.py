"""LoRA files of others: names that are placed, files that are refused, bases that do not fit, and who takes
them."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_writers import FORMS, KOHYA, close, factors, reference, state_of, underscored
from safetensors.torch import load_file, save_file
from tiny_models import tiny_mmdit, tiny_wan

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError, NotFinite
from apt_core.files import keys, lora_keys
from apt_core.files.lora_keys import find_place, is_lora, wan_layers
from apt_core.loading import checkpoint, sources
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.sources import ASSETS, SHIPPED, read_transformer
from apt_core.models import lora_files
from apt_core.models.lora import (
    add_adapters,
    load_lora,
    lora_state,
    merged_state,
    role,
    save_lora,
)
from apt_core.models.lora_files import merge, official_shapes, read_lora, read_lora_for
from apt_core.models.wan import WanBackbone

NAMES = json.loads((Path(__file__).parent / "lora_names.json").read_text())


def refusal(path, **kw):
    with pytest.raises(AptError) as error:
        read_lora(path, **kw)
    text = str(error.value)
    assert text.count("\n") == 0 and text.endswith(".") and str(path) in text
    return text


@pytest.mark.parametrize(
    "config, says",
    [
        ({"use_dora": True}, "says use_dora, but only plain LoRAs can be added"),
        ({"peft_type": "LOHA"}, "says peft_type LOHA, but only plain"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "says init_lora_weights pissa_niter_4, which changes the base, but only plain",
        ),
        ({"lora_alpha": "six"}, "has lora_alpha 'six', alpha_pattern {}: they must be numbers"),
        ({"lora_alpha": math.inf}, "has lora_alpha inf, alpha_pattern {}: they must be numbers"),
        ({"lora_alpha": 10**400}, "has lora_alpha 1000"),
        ({"alpha_pattern": {"a": None}}, 'has lora_alpha 8, alpha_pattern {"a": null}: they must be numbers'),
        ({"alpha_pattern": {"(a+)+$": 1}}, "has the pattern '(a+)+$', but only names of layers can be read"),
    ],
)
def test_settings_of_peft_that_cannot_be(wan, tmp_path, config, says):
    save_file(FORMS["PEFT"](factors(wan())), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert f": adapter_config.json {says}" in refusal(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("form", NAMES["placed"])
def test_names_that_others_write(form):
    for key, (layer, part) in NAMES["placed"][form].items():
        place = find_place(key)
        assert place and (place.form, place.layer, place.part) == (form, layer, part), key
        assert is_lora([key]) or part == "alpha", key


def test_every_weight_of_wan_has_its_place_in_every_form():
    """Also of image-to-video; and no two names are one."""
    with torch.device("meta"):
        model = tiny_wan(layers=11, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=6)
    for name in official_shapes(model):
        layer = name.removesuffix(".weight").removesuffix(".bias")
        other = keys.transformer_to_diffusers(layer)
        flat = [prefix + underscored(layer) for prefix in ("lora_unet_", "lora_unet__", "lycoris_")]
        for key in (
            f"diffusion_model.{layer}",
            layer,
            f"base_model.model.{layer}",
            f"base_model.model.{other}",
            f"transformer.{other}",
            *flat,
        ):
            end = "diff_b" if name.endswith(".bias") else "diff"
            place = find_place(f"{key}.{end}")
            assert (place.layer, place.part) == (layer, end), key
            assert end == "diff_b" or lora_keys.weight_of(place.layer) == name
    for in_block, table in ((True, keys.BLOCK), (False, keys.TOP)):
        names = [underscored(name) for pair in table.items() for name in set(pair)]
        assert len(set(names)) == len(names) and wan_layers(in_block, True).keys() == set(names)


@pytest.mark.parametrize("key", NAMES["refused"])
def test_what_is_refused_by_name(wan, tmp_path, key):
    path, says = tmp_path / "x.safetensors", NAMES["refused"][key]
    save_file({**KOHYA(factors(wan())), key: torch.ones(2, 2)}, path)
    text = refusal(path)
    assert text.startswith(f"{path} {says}") and f"({key})" in text
    assert is_lora([key]) or key == "scaled_fp8" or ".a1." in key or key.endswith((".alpha", "weight"))


PAIR = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 24), "blocks.0.ffn.0.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"blocks.0.ffn.1.lora_A.weight": torch.ones(2, 2), "blocks.0.x.diff": torch.ones(2)},
            "blocks.0.ffn.1.lora_A.weight and 1 more cannot be placed in a Wan transformer: give a LoRA of "
            "this model",
        ),
        (
            {"lora_unet_blocks_0_ffn_5.alpha": torch.ones(1)},
            "lora_unet_blocks_0_ffn_5.alpha cannot be placed in a Wan transformer",
        ),
        ({"blocks.0.ffn.0.lora_A.bias": torch.ones(2)}, "blocks.0.ffn.0.lora_A.bias cannot be placed"),
        (
            {"blocks.0.ffn.0.weight": torch.ones(32, 24)},
            "blocks.0.ffn.0.weight cannot be placed in a Wan transformer",
        ),
        (
            {"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.ones(2, 24)},
            "changes blocks.0.ffn.0 twice (blocks.0.ffn.0.lora_A.weight, "
            "lora_unet_blocks_0_ffn_0.lora_down.weight): give a file with one LoRA",
        ),
        ({"blocks.0.ffn.0.lora_A.second.weight": torch.ones(2, 24)}, "changes blocks.0.ffn.0 twice"),
        (
            {"blocks.0.ffn.0.diff_b": torch.ones(32), "blocks.0.ffn.0.lora_B.bias": torch.ones(32)},
            "changes the bias of blocks.0.ffn.0 twice",
        ),
        (
            {"blocks.0.ffn.2.lora_A.weight": torch.ones(2, 32)},
            "blocks.0.ffn.2 has only blocks.0.ffn.2.lora_A.weight: the file is incomplete",
        ),
        ({"blocks.0.ffn.2.alpha": torch.ones(())}, "blocks.0.ffn.2 has only blocks.0.ffn.2.alpha"),
        (
            {"blocks.0.ffn.0.lora_A.weight": torch.ones(3, 24)},
            "the factors of blocks.0.ffn.0, (3, 24) and (32, 2), do not fit",
        ),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": torch.ones(0, 24),
                "blocks.0.ffn.0.lora_B.weight": torch.ones(32, 0),
            },
            "(0, 24) and (32, 0), do not fit",
        ),
        (
            {"blocks.0.ffn.0.lora_A.weight": torch.ones(2)},
            "the factors of blocks.0.ffn.0, (2,) and (32, 2), do not fit",
        ),
        (
            {"blocks.0.ffn.0.alpha": torch.ones(2)},
            "blocks.0.ffn.0.alpha has shape (2,), but must be one number",
        ),
        (
            {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 24, dtype=torch.int8)},
            "blocks.0.ffn.0.lora_A.weight is stored as I8: only fp32",
        ),
    ],
)
def test_files_that_are_not_whole(tmp_path, change, says):
    path = tmp_path / "x.safetensors"
    save_file(PAIR | change, path)
    assert says in refusal(path)


def test_nan_and_no_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(PAIR | {"blocks.0.ffn.0.alpha": torch.tensor(math.nan)}, path)
    with pytest.raises(NotFinite, match=r"blocks\.0\.ffn\.0\.alpha holds NaN or infinite values"):
        read_lora(path).load()
    save_file({}, path)
    assert "holds no tensors" in refusal(path)


def test_a_base_that_does_not_fit(wan, tmp_path):
    path, shapes = tmp_path / "x.safetensors", official_shapes(wan())
    end = "give as the base the model that this LoRA was trained on"
    for layer, says in [
        (
            "blocks.30.self_attn.q",
            f"{path} changes blocks.30.self_attn.q.weight, which b (3 blocks) does not have: {end}.",
        ),
        (
            "blocks.0.cross_attn.k_img",
            f"{path} changes blocks.0.cross_attn.k_img.weight, which b (3 blocks) "
            f"does not have: {end}, an image-to-video model.",
        ),
        (
            "blocks.0.self_attn.q",
            f"{path} changes blocks.0.self_attn.q.weight by (5120, 5120), but in b it "
            f"is (24, 24): {end}, of width 5120 (that of the 14B models).",
        ),
        (
            "blocks.0.modulation",
            f"{path} changes blocks.0.modulation by (5120, 5120), but in b it is (1, 6, 24): {end}.",
        ),
    ]:
        save_file(
            {f"{layer}.lora_A.weight": torch.ones(1, 5120), f"{layer}.lora_B.weight": torch.ones(5120, 1)},
            path,
        )
        with pytest.raises(AptError) as error:
            read_lora(path).check(shapes, "b")
        assert str(error.value) == says
    save_file({"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, path)
    with pytest.raises(
        AptError, match=r"changes blocks.0.self_attn.norm_q.bias, which the base \(3 blocks\) does not have"
    ):
        read_lora(path).check(shapes)


def header_only(path, config):
    """A file of a Wan of this config in bf16 whose weights are a hole in the disk."""
    with torch.device("meta"):
        shapes = official_shapes(WanBackbone(**config))
    entries, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return path


def test_the_miniatures_lora_on_a_14b_is_refused_from_the_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_tensors", None)
    monkeypatch.setattr(lora_files, "read_tensors", None)
    wide = header_only(
        tmp_path / "14b.safetensors",
        dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=2),
    )
    mini = add_adapters(load_backbone(SHIPPED["base"], device="meta"), ["generator"], rank=3)
    ours = {key: torch.zeros(value.shape) for key, value in lora_state(mini, "generator").items()}
    for name, tensors, metadata in [
        ("ours", ours, {"apt": json.dumps({"format": 1, "kind": "lora", "base": "mini"})}),
        (
            "others",
            {
                key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
                for key, value in ours.items()
            },
            None,
        ),
    ]:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        with pytest.raises(AptError) as error:
            OneStepPipeline.from_checkpoint(path, "mini", "mini", base=wide)
        assert str(error.value) == (
            f"{path} changes blocks.0.cross_attn.k.weight by (128, 128), but in {wide} it is (5120, 5120): "
            "give as the base the model that this LoRA was trained on, of width 128 (the miniature's)."
        )


def test_a_pipeline_takes_a_foreign_lora_and_says_what_it_assumes(tmp_path):
    plain = load_backbone(SHIPPED["base"])
    change, said, path = factors(plain), [], tmp_path / "style.safetensors"
    save_file(KOHYA(change), path)
    with pytest.raises(AptError, match=r"is a LoRA: add base=PATH of the transformer that it belongs to\.$"):
        OneStepPipeline.from_checkpoint(path)
    pipe = OneStepPipeline.from_checkpoint(path, base="mini", cache=tmp_path, report=said.append)
    end = "by Euler steps; a LoRA for few steps wants its own steps and guidance."
    begin = (
        f"{path} has no metadata of this project: it is added to {{}} at strength 1 (alpha in the file) "
        f"and sampled like that model, "
    )
    assert said == [begin.format(SHIPPED["base"]) + end]
    assert not pipe.sources.transformer.few_step and pipe.sources.vae.name == str(SHIPPED["vae"])
    close(
        state_of(pipe.sources.transformer.load(torch.float64, torch.device("cpu"))), reference(plain, change)
    )
    over_apt = read_transformer(path, SHIPPED["checkpoint"])
    assert over_apt.few_step and over_apt.note == begin.format(SHIPPED["checkpoint"]) + "in one step."
    assert (
        over_apt.second_time == read_transformer(SHIPPED["checkpoint"]).second_time
        and over_apt.native["frames"] == 9
    )


def test_the_trainers_adapters_are_filled_from_any_form(wan, tmp_path):
    model = add_adapters(wan(), ["generator"], rank=2, alpha=6)
    adapters = {
        keys.transformer_to_official(layer): adapter
        for layer, adapter in role(model, "generator").adapters().items()
    }
    g = torch.Generator().manual_seed(4)
    change = {
        layer: (
            *(
                torch.randint(-4, 5, part.weight.shape, generator=g) / 8
                for part in (adapter.lora_A, adapter.lora_B)
            ),
            4.0,
        )
        for layer, adapter in adapters.items()
    }
    for form, write in FORMS.items():
        save_file(write(change), tmp_path / "lora.safetensors")
        for adapter in adapters.values():
            torch.nn.init.ones_(adapter.lora_B.weight)
        load_lora(tmp_path / "lora.safetensors", model, "generator")
        found = {
            keys.transformer_to_official(name): value
            for name, value in merged_state(model.double(), "generator").items()
        }
        for name, value in reference(wan(), change).items():
            # A third, alpha / rank of the role, is rounded in fp32.
            torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6, msg=f"{form}: {name}")
        model.float()


def test_an_mmdits_lora_has_its_own_names(tmp_path):
    plain, model, path = tiny_mmdit(2), tiny_mmdit(2), tmp_path / "lora.safetensors"
    add_adapters(model, ["generator"], rank=2)
    for p in role(model, "generator").parameters():
        torch.nn.init.normal_(p)
    save_lora(path, model, "generator", {})
    text = refusal(path)
    assert (
        "cannot be placed in a Wan transformer: add the base that it belongs to, if that is no Wan." in text
    )
    merged = merge(plain, read_lora_for(path, plain, "base").load()).state_dict()
    for name, value in merged_state(model, "generator").items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5)
    tensors = {
        "lora_unet_" + key.removeprefix("diffusion_model.").replace(".lora", "@").replace(".", "_")
        for key in load_file(path)
    }
    flat = {key.replace("@", ".lora").replace("_weight", ".weight") for key in tensors}
    own = lora_files.own_names(plain)
    assert {find_place(key, own).layer for key in flat} == {
        find_place(key, own).layer for key in load_file(path)
    }


def test_a_lora_in_the_place_of_a_model(wan, tmp_path):
    """However it is written; nobody who gave a base is told to give one."""
    for name, tensors in {
        "kohya": KOHYA(factors(wan())),
        "ours": FORMS["ComfyUI"](factors(wan())),
        "diff": {"blocks.0.norm3.diff": torch.ones(24)},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        says = (
            f"{path} is a LoRA, not a whole Wan transformer: give a whole model here; `python -m trainer "
            f"export LORA --base MODEL` makes one of both."
        )
        for attempt in (
            lambda: load_transformer(path),
            lambda: read_transformer(path, path),
            lambda: load_backbone(path, device="meta"),
        ):
            with pytest.raises(AptError) as error:
                attempt()
            assert str(error.value) == says
    save_file(KOHYA(factors(wan())), path, {"apt": json.dumps({"format": 1, "kind": "lora"})})
    save_generator(tmp_path / "base.safetensors", wan(), wan().config, {"kind": "base"})
    assert read_transformer(path, tmp_path / "base.safetensors").few_step


def test_whole_models_are_no_loras():
    files = [*ASSETS.rglob("*.safetensors")]
    assert len(files) >= 4 and not any(is_lora(sources.read_header(path).shapes) for path in files)
    with torch.device("meta"):
        image = tiny_wan(WanTransformer3DModel, 1, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=6)
        own = tiny_mmdit(1)
    assert not is_lora([*image.state_dict(), *own.state_dict(), *official_shapes(own)])


def test_a_file_that_is_replaced_after_its_header_was_read(tmp_path):
    """What was read of it is not true of the other."""
    path, names = tmp_path / "lora.safetensors", [f"blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    save_file({names[0]: torch.ones(2, 24), names[1]: torch.ones(48, 2)}, path)
    lora = read_lora(path)
    assert lora.load()["blocks.0.ffn.0.weight"].up.shape == (48, 2)
    save_file({names[0]: torch.ones(3, 24), names[1]: torch.ones(48, 3)}, path)
    with pytest.raises(AptError, match=r"was replaced by another file while it was in use: start again\.$"):
        lora.load()


def test_a_lora_goes_into_a_role_from_what_its_header_said(wan, tmp_path):
    path, names = tmp_path / "lora.safetensors", [f"blocks.0.self_attn.q.lora_{side}.weight" for side in "AB"]
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 24, generator=g), torch.randn(24, 2, generator=g)
    save_file(dict(zip(names, (down, up), strict=True)), path)
    ours, theirs = (add_adapters(wan(), ["generator"], rank=2) for _ in range(2))
    load_lora(read_lora(path), ours, "generator")
    load_lora(path, theirs, "generator")
    found, expected = merged_state(ours, "generator"), merged_state(theirs, "generator")
    key = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(found[key], wan().state_dict()[key] + up @ down, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[key], expected[key])
    save_file(dict(zip(names, (torch.ones(2, 48), torch.ones(48, 2)), strict=True)), path)
    with pytest.raises(AptError, match=r"by \(48, 48\), but in the base it is \(24, 24\): give as the base"):
        load_lora(read_lora(path), ours, "generator")
