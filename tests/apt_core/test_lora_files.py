"""LoRA files as others write them: the same change in every form merges to the same weights, and the rest is refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from apt_core import checkpoint, keys, lora_files, lora_keys, sources
from apt_core.checkpoint import load_transformer, save_generator
from apt_core.errors import AptError
from apt_core.lora import add_adapters, load_lora, lora_state, merged_state, role, save_lora
from apt_core.lora_files import Delta, merge, official_shapes, read_lora, read_lora_for
from apt_core.lora_keys import find_place, is_lora, wan_layers
from apt_core.mmdit import MMDiTBackbone
from apt_core.pipeline import OneStepPipeline
from apt_core.sources import ASSETS, SHIPPED, load_backbone, read_transformer
from apt_core.wan import WanBackbone

NAMES = json.loads((Path(__file__).parent / "lora_names.json").read_text())
TINY = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=16, ffn_dim=32)


def refusal(path, **kw):
    with pytest.raises(AptError) as error:
        read_lora(path, **kw)
    text = str(error.value)
    assert text.count("\n") == 0 and text.endswith(".") and str(path) in text
    return text


def factors(model, layers=None, outside=False):
    """By official layer: down, up, alpha. Ranks 2 and 4, scales 1/2 and 2; fp8 can hold every number."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for name, module in model.named_modules():
        official = isinstance(module, torch.nn.Linear) and keys.transformer_to_official(name)
        if official and (official.startswith("blocks.") or outside) and (layers is None or official.endswith(layers)):
            rank = 4 if "ffn" in official else 2
            down, up = (torch.randint(-4, 5, s, generator=g) / 8 for s in ((rank, module.in_features), (module.out_features, rank)))
            found[official] = down, up, {4: 2.0, 2: 4.0}[rank]
    return found


def reference(model, change):
    """The merged weights in fp64, by official name."""
    state = {keys.transformer_to_official(name): value.detach().double().clone() for name, value in model.state_dict().items()}
    for layer, (down, up, alpha) in change.items():
        state[f"{layer}.weight"] += up.double() @ down.double() * alpha / len(down)
    return state


def state_of(model):
    return {keys.transformer_to_official(name): value for name, value in model.state_dict().items()}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-13, msg=name)


def baked(down, up, alpha):
    return down, up * alpha / len(down)


def official(prefix, down="lora_A", up="lora_B", alpha=True, name=str, infix=""):
    """A writer of one form: {layer: (down, up, alpha)} to the tensors of its file."""

    def write(change):
        tensors = {}
        for layer, (a, b, scale) in change.items():
            a, b = (a, b) if alpha else baked(a, b, scale)
            layer = prefix + name(layer)
            tensors |= {f"{layer}.{down}{infix}.weight": a, f"{layer}.{up}{infix}.weight": b}
            tensors |= {f"{layer}.alpha": torch.tensor(scale)} if alpha else {}
        return {key: value.contiguous() for key, value in tensors.items()}

    return write


def underscored(layer):
    return layer.replace(".", "_")


KOHYA = official("lora_unet_", "lora_down", "lora_up", name=underscored)
FORMS = {
    "ComfyUI": official("diffusion_model.", alpha=False),
    "ComfyUI, alpha": official("diffusion_model.", "lora_down", "lora_up"),
    "ComfyUI, A and alpha": official("model.diffusion_model."),
    "no prefix": official("", alpha=False, infix=".default"),
    "DiffSynth": official("pipe.dit.", alpha=False, infix=".default"),
    "kohya": KOHYA,
    "VideoX-Fun": official("lora_unet__", "lora_down", "lora_up", name=underscored),
    "LyCORIS": official("lycoris_", "lora_down", "lora_up", name=underscored),
    "PEFT": official("base_model.model.", alpha=False),
    "PEFT, default": official("base_model.model.", alpha=False, infix=".default"),
    "PEFT, over diffusers": official("base_model.model.", alpha=False, name=keys.transformer_to_diffusers),
    "diffusers": official("transformer.", alpha=False, name=keys.transformer_to_diffusers),
    "diffusers, down and up": official("transformer.", "lora.down", "lora.up", name=keys.transformer_to_diffusers),
}
BY_DIFFUSERS = ("ComfyUI", "ComfyUI, alpha", "kohya", "diffusers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_to_the_same_weights(wan, tmp_path, form, dtype):
    model, path = wan().double(), tmp_path / "lora.safetensors"
    change = factors(model, outside=True)
    if dtype == torch.float8_e5m2:  # two bits of fraction
        change = {layer: (down.sign() / 2, up.sign() / 4, alpha) for layer, (down, up, alpha) in change.items()}
    expected = reference(model, change)
    save_file({key: value.to(dtype) for key, value in FORMS[form](change).items()}, path)
    lora = read_lora(path)
    assert lora.form == form.partition(",")[0] and set(lora.ranks.values()) == {2, 4} and lora.only_factors
    assert sorted(lora.targets) == sorted(f"{layer}.weight" for layer in change) and len(change) == 36
    lora.check(official_shapes(model))
    close(state_of(merge(model, lora.load())), expected)


@pytest.mark.parametrize("form", BY_DIFFUSERS)
def test_stock_diffusers_reads_the_same(wan, stock, tmp_path, form):
    change = factors(wan())
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
    "patterns": dict(r=4, lora_alpha=6, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn1.to_q": 5, "1.attn2.to_k": 9}),
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
    assert sum(not torch.equal(ours[name], value.double()) for name, value in state_of(wan()).items()) == len(lora.targets)


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
        WanPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(model), transformer_lora_adapter_metadata=about)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.form == ("no prefix" if how == "model" else "diffusers") and lora.alpha == "in lora_adapter_metadata"
    found = {layer: lora.load()[f"{layer}.weight"].scale for layer in lora.ranks}
    assert found == {layer: (2 if layer.endswith("cross_attn.v") else 6) / 4 for layer in lora.ranks} and len(found) == 12
    model.double().fuse_lora()
    model.unload_lora()
    close(state_of(merge(wan().double(), lora.load())), state_of(model))


@pytest.mark.parametrize(
    "config, says",
    [
        ({"use_dora": True}, "says use_dora, and only plain LoRAs can be added"),
        ({"peft_type": "LOHA"}, "says peft_type LOHA, and only plain"),
        ({"init_lora_weights": "pissa_niter_4"}, "says init_lora_weights pissa_niter_4, which changes the base, and only plain"),
        ({"lora_alpha": "six"}, "has lora_alpha 'six', alpha_pattern {}: they must be numbers"),
        ({"lora_alpha": math.inf}, "has lora_alpha inf, alpha_pattern {}: they must be numbers"),
        ({"alpha_pattern": {"a": None}}, 'has lora_alpha 8, alpha_pattern {"a": null}: they must be numbers'),
        ({"alpha_pattern": {"(a+)+$": 1}}, "has the pattern '(a+)+$', and only names of layers can be read"),
    ],
)
def test_settings_of_peft_that_cannot_be(wan, tmp_path, config, says):
    save_file(FORMS["PEFT"](factors(wan())), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert f": adapter_config.json {says}" in refusal(tmp_path / "adapter_model.safetensors")


def test_whole_differences_and_biases(wan, tmp_path):
    """As LightX2V and LoRA extractors write them, beside factors; the bias of lora_B is scaled as its factors are."""
    model, path = wan().double(), tmp_path / "lora.safetensors"
    shapes, state = official_shapes(model), {name: value.clone() for name, value in state_of(model).items()}
    g = torch.Generator().manual_seed(1)
    whole = {
        "blocks.0.modulation.diff": "blocks.0.modulation", "blocks.1.diff_m": "blocks.1.modulation", "head.modulation.diff": "head.modulation",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight", "blocks.0.norm3.diff_b": "blocks.0.norm3.bias", "head.head.diff": "head.head.weight",
        "blocks.1.norm3.w_norm": "blocks.1.norm3.weight", "blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
        "patch_embedding.diff": "patch_embedding.weight", "head.head.diff_b": "head.head.bias", "blocks.2.self_attn.norm_q.diff": "blocks.2.self_attn.norm_q.weight",
        "blocks.2.ffn.0.diff": "blocks.2.ffn.0.weight",
    }  # fmt: skip
    tensors = {key: torch.randn(shapes[name], generator=g) for key, name in whole.items()}
    for key, name in whole.items():
        state[name] += tensors[key].double()
    layer = "blocks.2.ffn.0"  # has factors, a bias of lora_B and a difference
    down, up, bias = (torch.randn(shape, generator=g) for shape in ((3, 24), (32, 3), (32,)))
    tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.lora_B.bias": bias, f"{layer}.alpha": torch.tensor([6])}
    state[f"{layer}.weight"] += up.double() @ down.double() * 2
    state[f"{layer}.bias"] += bias.double() * 2
    down, up = torch.randn(2, 4, 1, 2, 2, generator=g), torch.randn(24, 2, 1, 1, 1, generator=g)  # as a convolution's are saved
    tensors |= {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    state["patch_embedding.weight"] += torch.einsum("or,ricde->oicde", up[..., 0, 0, 0].double(), down.double())
    save_file({f"diffusion_model.{key}": value for key, value in tensors.items()}, path)
    lora = read_lora(path)
    assert set(lora.targets) == {*whole.values(), f"{layer}.bias"} and lora.ranks == {layer: 3, "patch_embedding": 2} and not lora.only_factors
    assert lora.alpha == "in the file, elsewhere taken as multiplied in"
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
    with pytest.raises(AptError, match=r"^with the LoRA added, blocks.0.self_attn.q.weight has weights beyond what fp16 can hold: use bf16 or fp32\.$"):
        merge(wan().half(), {"blocks.0.self_attn.q.weight": Delta(up=torch.full((24, 1), 300.0), down=torch.full((1, 24), 300.0))})


@pytest.mark.parametrize("form", NAMES["placed"])
def test_names_that_others_write(form):
    for key, (layer, part) in NAMES["placed"][form].items():
        place = find_place(key)
        assert place and (place.form, place.layer, place.part) == (form, layer, part), key
        assert is_lora([key]) or part == "alpha", key


def test_every_weight_of_wan_has_its_place_in_every_form():
    """Also of image-to-video; and no two names are one."""
    with torch.device("meta"):
        model = WanBackbone(**TINY, num_layers=11, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=6)
    for name in official_shapes(model):
        layer = name.removesuffix(".weight").removesuffix(".bias")
        other = keys.transformer_to_diffusers(layer)
        flat = [prefix + underscored(layer) for prefix in ("lora_unet_", "lora_unet__", "lycoris_")]
        for key in (f"diffusion_model.{layer}", layer, f"base_model.model.{layer}", f"base_model.model.{other}", f"transformer.{other}", *flat):
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
        ({"blocks.0.ffn.1.lora_A.weight": torch.ones(2, 2), "blocks.0.x.diff": torch.ones(2)},
         "blocks.0.ffn.1.lora_A.weight and 1 more cannot be placed in a Wan transformer: give a LoRA of this model"),
        ({"lora_unet_blocks_0_ffn_5.alpha": torch.ones(1)}, "lora_unet_blocks_0_ffn_5.alpha cannot be placed in a Wan transformer"),
        ({"blocks.0.ffn.0.lora_A.bias": torch.ones(2)}, "blocks.0.ffn.0.lora_A.bias cannot be placed"),
        ({"blocks.0.ffn.0.weight": torch.ones(32, 24)}, "blocks.0.ffn.0.weight cannot be placed in a Wan transformer"),
        ({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.ones(2, 24)},
         "changes blocks.0.ffn.0 twice (blocks.0.ffn.0.lora_A.weight, lora_unet_blocks_0_ffn_0.lora_down.weight): give a file with one LoRA"),
        ({"blocks.0.ffn.0.lora_A.second.weight": torch.ones(2, 24)}, "changes blocks.0.ffn.0 twice"),
        ({"blocks.0.ffn.0.diff_b": torch.ones(32), "blocks.0.ffn.0.lora_B.bias": torch.ones(32)}, "changes the bias of blocks.0.ffn.0 twice"),
        ({"blocks.0.ffn.2.lora_A.weight": torch.ones(2, 32)}, "of blocks.0.ffn.2 there is only blocks.0.ffn.2.lora_A.weight: the file is not whole"),
        ({"blocks.0.ffn.2.alpha": torch.ones(())}, "of blocks.0.ffn.2 there is only blocks.0.ffn.2.alpha"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.ones(3, 24)}, "the factors of blocks.0.ffn.0, (3, 24) and (32, 2), do not fit"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.ones(0, 24), "blocks.0.ffn.0.lora_B.weight": torch.ones(32, 0)}, "(0, 24) and (32, 0), do not fit"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.ones(2)}, "the factors of blocks.0.ffn.0, (2,) and (32, 2), do not fit"),
        ({"blocks.0.ffn.0.alpha": torch.ones(2)}, "blocks.0.ffn.0.alpha has shape (2,), and is no number"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 24, dtype=torch.int8)}, "blocks.0.ffn.0.lora_A.weight is stored as I8: only fp32"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole(tmp_path, change, says):
    path = tmp_path / "x.safetensors"
    save_file(PAIR | change, path)
    assert says in refusal(path)


def test_nan_and_no_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(PAIR | {"blocks.0.ffn.0.alpha": torch.tensor(math.nan)}, path)
    with pytest.raises(AptError, match=r"blocks\.0\.ffn\.0\.alpha holds NaN or infinite values"):
        read_lora(path).load()
    save_file({}, path)
    assert "holds no tensors" in refusal(path)


def test_a_base_that_does_not_fit(wan, tmp_path):
    path, shapes = tmp_path / "x.safetensors", official_shapes(wan())
    end = "give as the base the model that this LoRA was trained on"
    for layer, says in [
        ("blocks.30.self_attn.q", f"{path} changes blocks.30.self_attn.q.weight, which b (3 blocks) does not have: {end}."),
        ("blocks.0.cross_attn.k_img", f"{path} changes blocks.0.cross_attn.k_img.weight, which b (3 blocks) does not have: {end}, an image-to-video model."),
        ("blocks.0.self_attn.q", f"{path} changes blocks.0.self_attn.q.weight by (5120, 5120), but in b it is (24, 24): {end}, of width 5120 (that of the 14B models)."),
        ("blocks.0.modulation", f"{path} changes blocks.0.modulation by (5120, 5120), but in b it is (1, 6, 24): {end}."),
    ]:  # fmt: skip
        save_file({f"{layer}.lora_A.weight": torch.ones(1, 5120), f"{layer}.lora_B.weight": torch.ones(5120, 1)}, path)
        with pytest.raises(AptError) as error:
            read_lora(path).check(shapes, "b")
        assert str(error.value) == says
    save_file({"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, path)
    with pytest.raises(AptError, match=r"changes blocks.0.self_attn.norm_q.bias, which the base \(3 blocks\) does not have"):
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
    wide = header_only(tmp_path / "14b.safetensors", dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=2))
    mini = add_adapters(load_backbone(SHIPPED["base"], device="meta"), ["generator"], rank=3)
    ours = {key: torch.zeros(value.shape) for key, value in lora_state(mini, "generator").items()}
    for name, tensors, metadata in [
        ("ours", ours, {"apt": json.dumps({"format": 1, "kind": "lora", "base": "mini"})}),
        ("others", {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in ours.items()}, None),
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
    begin = f"{path} has no metadata of this project: it is added to {{}} at strength 1 (alpha in the file) and sampled as that is, "
    assert said == [begin.format(SHIPPED["base"]) + end]
    assert not pipe.sources.transformer.few_step and pipe.sources.vae.name == str(SHIPPED["vae"])
    close(state_of(pipe.sources.transformer.load(torch.float64, torch.device("cpu"))), reference(plain, change))
    over_apt = read_transformer(path, SHIPPED["checkpoint"])
    assert over_apt.few_step and over_apt.assumed == begin.format(SHIPPED["checkpoint"]) + "in one step."
    assert over_apt.second_time == read_transformer(SHIPPED["checkpoint"]).second_time and over_apt.native["frames"] == 9


def test_the_trainers_adapters_are_filled_from_any_form(wan, tmp_path):
    model = add_adapters(wan(), ["generator"], rank=2, alpha=6)
    adapters = {keys.transformer_to_official(layer): adapter for layer, adapter in role(model, "generator").adapters().items()}
    g = torch.Generator().manual_seed(4)
    change = {
        layer: (*(torch.randint(-4, 5, part.weight.shape, generator=g) / 8 for part in (adapter.lora_A, adapter.lora_B)), 4.0)
        for layer, adapter in adapters.items()
    }
    for form, write in FORMS.items():
        save_file(write(change), tmp_path / "lora.safetensors")
        for adapter in adapters.values():
            torch.nn.init.ones_(adapter.lora_B.weight)
        load_lora(tmp_path / "lora.safetensors", model, "generator")
        found = {keys.transformer_to_official(name): value for name, value in merged_state(model.double(), "generator").items()}
        for name, value in reference(wan(), change).items():
            # A third, alpha / rank of the role, is rounded in fp32.
            torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6, msg=f"{form}: {name}")
        model.float()
    before = {name: value.clone() for name, value in role(model, "generator").state_dict().items()}
    for extra, says in [({"blocks.0.ffn.0.diff_b": torch.ones(32)}, "blocks.0.ffn.0.diff_b not known"), ({}, "missing")]:
        save_file((KOHYA(change) if extra else PAIR) | extra, tmp_path / "lora.safetensors")
        with pytest.raises(AptError, match=says):
            load_lora(tmp_path / "lora.safetensors", model, "generator")
    assert all(torch.equal(before[name], value) for name, value in role(model, "generator").state_dict().items())


def test_an_mmdits_lora_has_its_own_names(tmp_path):
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, axes_dims_rope=(4, 4, 4), num_layers=2)
    plain, path = MMDiTBackbone(**config), tmp_path / "lora.safetensors"
    model = MMDiTBackbone(**config)
    model.load_state_dict(plain.state_dict())
    add_adapters(model, ["generator"], rank=2)
    for p in role(model, "generator").parameters():
        torch.nn.init.normal_(p)
    save_lora(path, model, "generator", {})
    text = refusal(path)
    assert "cannot be placed in a Wan transformer: add the base that it belongs to, if that is no Wan." in text
    merged = merge(plain, read_lora_for(path, plain, "base").load()).state_dict()
    for name, value in merged_state(model, "generator").items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5)
    tensors = {"lora_unet_" + key.removeprefix("diffusion_model.").replace(".lora", "@").replace(".", "_") for key in load_file(path)}
    flat = {key.replace("@", ".lora").replace("_weight", ".weight") for key in tensors}
    own = lora_files.own_names(plain)
    assert {find_place(key, own).layer for key in flat} == {find_place(key, own).layer for key in load_file(path)}


def test_a_lora_in_the_place_of_a_model(wan, tmp_path):
    """However it is written; nobody who gave a base is told to give one."""
    for name, tensors in {"kohya": KOHYA(factors(wan())), "ours": FORMS["ComfyUI"](factors(wan())), "diff": {"blocks.0.norm3.diff": torch.ones(24)}}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        says = f"{path} is a LoRA, not a whole Wan transformer: give a whole model here; `python -m trainer export LORA --base MODEL` makes one of both."
        for attempt in (lambda: load_transformer(path), lambda: read_transformer(path, path), lambda: load_backbone(path, device="meta")):
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
        image = WanTransformer3DModel(**TINY, num_layers=1, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=6)
        own = MMDiTBackbone(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, axes_dims_rope=(4, 4, 4), num_layers=1)
    assert not is_lora([*image.state_dict(), *own.state_dict(), *official_shapes(own)])
