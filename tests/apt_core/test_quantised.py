"""Files in fp8 give the weights that their values and scales say; every other quantised form is refused by
its name, from its header.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.errors import AptError
from apt_core.files import quantised
from apt_core.files.checkpoint_header import read_header
from apt_core.loading import checkpoint
from apt_core.loading.checkpoint import load_transformer, read_config, save_generator
from apt_core.loading.sources import read_transformer
from apt_core.models.vae import load_vae, save_vae
from trainer.checkpoints.export import export, save_fp8
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.starting_models import check_base
from trainer.checkpoints.trained_models import open_generator
from trainer.config import load_preset

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Q = "blocks.1.self_attn.q.weight"


def velocity(model):
    """Of a model in fp64."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 4, 2, 4, 6, generator=generator), torch.randn(1, 5, 10, generator=generator)
    return model(x.double(), torch.tensor([1000.0]).double(), text.double(), return_dict=False)[0]


@pytest.fixture
def exact(wan):
    """A model whose linear layers in blocks are exact in fp8 with a power of two for a scale, and all else in
    bf16.
    """
    model = wan()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and name.endswith("weight") and parameter.ndim == 2:
                scale = 2.0**-12
                grid = (parameter / parameter.abs().max() * 448).to(E4M3).float()
                grid.view(-1)[0] = 448  # so that the export finds this scale
                parameter.copy_(grid * scale)
            else:
                parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture
def file(exact, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_generator(path, exact, exact.config, {"kind": "base"})
    return path


def pack(path, out, form, dtype=E4M3, prefix="", rows=False):
    """The same file in fp8. form: "old" (scaled_fp8), "new" (comfy_quant), "metadata", or "bare" (values
    alone).
    """
    strings, packed, layers = dict(read_header(path).metadata), {}, {}
    for key, value in load_file(path).items():
        module = key.removesuffix(".weight")
        if not (key.startswith("blocks.") and key.endswith(".weight") and value.ndim == 2):
            packed[key] = value.bfloat16()
            continue
        if form == "bare":
            packed[key] = value.to(dtype)
            continue
        largest = value.abs().amax(1, keepdim=True) if rows else value.abs().max()
        scale = (largest / torch.finfo(dtype).max).clamp(min=1e-12)
        packed[key] = (value / scale).to(dtype)
        packed[f"{module}.{'scale_weight' if form == 'old' else 'weight_scale'}"] = (
            scale.squeeze(1) if rows else scale
        )
        about = {
            "format": "float8_e4m3fn" if dtype == E4M3 else "float8_e5m2",
            "full_precision_matrix_mult": True,
        }
        if form == "new":
            packed[f"{module}.comfy_quant"] = torch.tensor(
                list(json.dumps(about).encode()), dtype=torch.uint8
            )
            packed[f"{module}.input_scale"] = torch.tensor(3.0)
        elif form == "metadata":
            layers[module] = about
        else:
            packed[f"{module}.scale_input"] = torch.tensor(3.0)
    if form == "old":
        packed["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if layers:
        strings["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({prefix + key: value for key, value in packed.items()}, out, metadata=strings)
    return out


@pytest.mark.parametrize("form", ["old", "new", "metadata"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_weights_that_fp8_holds_exactly_give_the_same_output(form, prefix, file, exact, same, tmp_path):
    packed = pack(file, tmp_path / "8.safetensors", form, prefix=prefix)
    again = load_transformer(packed)
    assert all(torch.equal(p, exact.get_parameter(name)) for name, p in again.named_parameters())
    same(again, exact, velocity)
    assert read_config(packed) == read_config(file)
    assert inspect(packed)["what"] == "Wan transformer, official keys, in scaled fp8"
    assert inspect(packed, deep=True)["loads"].startswith("yes, as checkpoint")


@pytest.mark.parametrize(
    "form, dtype, rows",
    [
        ("old", E4M3, False),
        ("old", E5M2, False),
        ("new", E4M3, True),
        ("bare", E4M3, False),
        ("bare", E5M2, False),
    ],
)
def test_dequantised_weights_are_the_closed_form(form, dtype, rows, wan, tmp_path):
    model = wan(seed=3)
    save_generator(tmp_path / "a.safetensors", model, model.config, {})
    packed = pack(tmp_path / "a.safetensors", tmp_path / "8.safetensors", form, dtype, rows=rows)
    again, different = load_transformer(packed), 0
    for name, weight in model.named_parameters():
        found = again.get_parameter(name)
        if name.startswith("blocks.") and name.endswith("weight") and weight.ndim == 2:
            largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
            scale = 1.0 if form == "bare" else largest / torch.finfo(dtype).max
            expected = (weight / scale).to(dtype).float() * scale
            different += not torch.equal(found, weight)
        else:
            expected = weight.bfloat16().float()
        assert torch.equal(found, expected), name
    assert different > 10  # and it is not the weights as they were
    half = load_transformer(packed, dtype=torch.bfloat16)
    name = "blocks.1.attn1.to_q.weight"
    assert torch.equal(half.get_parameter(name), again.get_parameter(name).bfloat16())


def test_our_own_export_is_read_back_everywhere(exact, file, same, tmp_path):
    save_fp8(tmp_path / "8.safetensors", exact, {"base": "test", "second_time": 0.6})
    assert set(read_header(tmp_path / "8.safetensors").dtypes.values()) == {"F8_E4M3", "BF16", "F32"}
    source = read_transformer(tmp_path / "8.safetensors")
    assert source.second_time == 0.6 and source.parameters == sum(p.numel() for p in exact.parameters())
    same(source.load(torch.float32, torch.device("cpu")), exact, velocity)
    generator = open_generator(tmp_path / "8.safetensors")
    same(generator.model, exact, velocity)
    export(tmp_path / "8.safetensors", tmp_path / "32.safetensors", dtype="fp32")
    same(load_transformer(tmp_path / "32.safetensors"), exact, velocity)


@pytest.mark.parametrize("place", ["file", "diffusers", "diffusers, two shards", "wan-ai"])
@pytest.mark.parametrize("what", ["base", "--start-from"])
def test_nothing_is_trained_from_fp8(place, what, file, exact, tmp_path):
    """Neither a file nor a folder of any kind, from where a base or a start may be."""
    packed = pack(file, tmp_path / "8.safetensors", "old")
    if place != "file":
        packed = folder_of(packed, exact, tmp_path / "folder", place)
    with pytest.raises(AptError) as error:
        check_base(packed, load_preset("mini").model, "mini", what)
    assert (
        str(error.value) == f"{what} {packed} is in scaled fp8, too coarse to train from: "
        "give the model in fp32, bf16 or fp16."
    )


def folder_of(packed, exact, folder, place):
    """The weights of a file in fp8 as a folder of a model; of two shards the second alone is in fp8."""
    folder.mkdir()
    name, tensors = "diffusion_pytorch_model", load_file(packed)
    if place == "wan-ai":
        (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2}))
    else:
        exact.save_config(folder)
    if "two" not in place:
        save_file(tensors, folder / f"{name}.safetensors", metadata=dict(read_header(packed).metadata))
        return folder
    coarse = {key: x for key, x in tensors.items() if x.dtype in (E4M3, E5M2) or "scale" in key}
    plain = {key: x for key, x in tensors.items() if key not in coarse}
    for number, part in enumerate((plain, coarse), start=1):
        save_file(part, folder / f"{name}-0000{number}-of-00002.safetensors")
    return folder


def change(path, edit, strings=None):
    tensors = load_file(path)
    metadata = dict(read_header(path).metadata)
    edit(tensors)
    save_file(tensors, path, metadata=metadata | (strings or {}))


def bytes_of(**about):
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


MODULE = Q.removesuffix(".weight")
ELSE = "give the file in bf16, fp16 or scaled fp8."
REFUSED = {
    "nvfp4": (
        lambda t: t.update({f"{MODULE}.comfy_quant": bytes_of(format="nvfp4")}),
        f"{MODULE} is quantised as nvfp4, which cannot be read: {ELSE}",
    ),
    "rotated": (
        lambda t: t.update(
            {f"{MODULE}.comfy_quant": bytes_of(format="float8_e4m3fn", convrot=True, convrot_groupsize=64)}
        ),
        f"{MODULE} is quantised as float8_e4m3fn, convrot, convrot_groupsize, which cannot be read: {ELSE}",
    ),
    "int8": (
        lambda t: t.update({Q: torch.zeros(24, 24, dtype=torch.int8)}),
        f"its weights are quantised as int8, which cannot be read: {ELSE}",
    ),
    "gptq": (
        lambda t: t.update({f"{MODULE}.qweight": torch.zeros(3, 24, dtype=torch.int32)}),
        f"its weights are quantised as GPTQ or AWQ, which cannot be read: {ELSE}",
    ),
    "bitsandbytes": (
        lambda t: t.update({f"{Q}.absmax": torch.zeros(9)}),
        f"its weights are quantised as bitsandbytes, which cannot be read: {ELSE}",
    ),
    "blocks": (
        lambda t: t.update({f"{MODULE}.scale_weight": torch.ones(3, 3)}),
        (
            f"{MODULE}.scale_weight is F32 of shape [3, 3], and only one number or one a row is read: "
            "give the file in bf16 or fp16."
        ),
    ),
    "lost": (
        lambda t: t.pop(f"{MODULE}.scale_weight"),
        f"{Q} is in fp8 and lacks the scale that others have: download or export the file again.",
    ),
    "halfway": (
        lambda t: t.update({Q: t[Q].float().half()}),
        f"{Q} has a scale, but is stored as F16, not in fp8: download it again.",
    ),
    "no json": (
        lambda t: t.update({f"{MODULE}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}),
        f"what it says about the quantisation of {MODULE} is not a JSON object: download it again.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_named_before_a_weight_is_read(name, file, tmp_path, monkeypatch):
    packed = pack(file, tmp_path / "8.safetensors", "old")
    edit, sentence = REFUSED[name]
    change(packed, edit)
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *args, **more: pytest.fail("a weight was read"))
    for read in (load_transformer, read_transformer, read_config, open_generator):
        with pytest.raises(AptError) as caught:
            read(packed)
        assert str(caught.value) == f"{packed}: {sentence}"
    assert inspect(packed)["loads"] == f"no: {packed}: {sentence}"


def test_metadata_that_names_another_form(file, tmp_path):
    packed = pack(file, tmp_path / "8.safetensors", "metadata")
    for about, says in (
        ({MODULE: {"format": "mxfp8"}}, f"{MODULE} is quantised as mxfp8"),
        ({MODULE: 3}, "is not a JSON object"),
    ):
        change(packed, lambda t: None, {"_quantization_metadata": json.dumps({"layers": about})})
        with pytest.raises(AptError, match=re.escape(says)):
            load_transformer(packed)


def test_gguf_is_called_by_its_name(tmp_path):
    (tmp_path / "wan.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    for read in (load_transformer, read_transformer, inspect, load_vae):
        with pytest.raises(
            AptError,
            match=(
                r"wan.gguf is a GGUF file, whose quantised weights are not read: give the model in"
                r" safetensors"
            ),
        ):
            read(tmp_path / "wan.gguf")


def test_a_vae_in_fp8_is_its_values(tmp_path):
    from trainer.mini import VAE

    vae = load_vae(VAE)
    save_vae(tmp_path / "a.safetensors", vae)
    tensors = load_file(tmp_path / "a.safetensors")
    key = "decoder.middle.0.residual.2.weight"
    save_file(tensors | {key: tensors[key].to(E4M3)}, tmp_path / "8.safetensors")
    found = load_vae(tmp_path / "8.safetensors").state_dict()["decoder.mid_block.resnets.0.conv1.weight"]
    assert torch.equal(found, tensors[key].to(E4M3).float())


def test_plain_files_are_said_nothing_of(file):
    header = read_header(file)
    assert quantised.form_of(header) == "" and quantised.plain_header(file, header) is header
