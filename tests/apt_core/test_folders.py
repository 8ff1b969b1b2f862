"""Folders as people have them: variants, Wan-AI's own, shards alone, prefixes; understood, or named for what
they are.
"""

import json
import logging

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.folders import half_note
from apt_core.files.keys import detect_vae_layout
from apt_core.loading.checkpoint import load_transformer, read_config, save_generator
from apt_core.loading.sources import SHIPPED, read_transformer
from apt_core.loading.text_files import read_text_encoder
from apt_core.models.vae import load_vae, save_vae
from trainer.checkpoints.inspect import inspect


def equal(found, expected) -> bool:
    return all(torch.equal(value, expected.state_dict()[key]) for key, value in found.state_dict().items())


def refuse(read, path, sentence):
    with pytest.raises(AptError) as caught:
        read(path)
    assert sentence in str(caught.value), str(caught.value)


def original(folder, model, shards=1, **config):
    """A folder of Wan-AI: official keys, their own config."""
    folder.mkdir(parents=True)
    save_generator(folder / "all.safetensors", model, model.config, {})
    tensors = load_file(folder / "all.safetensors")
    (folder / "all.safetensors").unlink()
    about = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": 24,
        "num_heads": 2,
        "num_layers": 3,
        "eps": 1e-6,
        "text_len": 512,
    }
    (folder / "config.json").write_text(json.dumps(about | config), encoding="utf-8")
    stem = "diffusion_pytorch_model"
    names = (
        [f"{stem}.safetensors"]
        if shards == 1
        else [f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    )
    weight_map = {key: names[number % shards] for number, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: value for key, value in tensors.items() if weight_map[key] == name}, folder / name)
    if shards > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map}), encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize("shards", [1, 6])
def test_a_folder_of_wan_ai_is_read(shards, wan, tmp_path):
    model = wan()
    folder = original(tmp_path / "Wan2.1", model, shards)
    assert equal(load_transformer(folder), model)
    assert read_config(folder)["num_attention_heads"] == 2 and inspect(folder)["loads"].startswith(
        "yes, as checkpoint"
    )
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)
    assert equal(load_transformer(folder), model)  # the shards' names say how many there are


def test_what_a_folder_of_wan_ai_cannot_give_is_named(wan, tmp_path):
    folder = original(tmp_path / "a", wan(), num_heads=5)
    refuse(load_transformer, folder, "the number of heads cannot be told from 24 channels")
    (folder / "Wan2.1_VAE.pth").write_bytes(b"PK\3\4")
    hint = "(its Wan2.1_VAE.pth is a pickle, which can run code when it is opened)"
    refuse(load_vae, folder, f"has no config.json of an AutoencoderKLWan {hint}: give")
    refuse(
        read_text_encoder, folder, f"is not a folder of a UMT5 encoder (config.json and .safetensors) {hint}"
    )
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refuse(
        load_transformer,
        folder,
        f"has no diffusion_pytorch_model.safetensors {hint}: download it again, in safetensors.",
    )


def test_one_shard_of_six_is_named(wan, tmp_path):
    folder = original(tmp_path / "a", wan(), 6)
    for number in (1, 4):
        shard = folder / f"diffusion_pytorch_model-0000{number}-of-00006.safetensors"
        sentence = (
            f"{shard} is shard {number} of 6 of a model: give the folder that holds all of them, "
            "with its config.json."
        )
        for read in (load_transformer, read_config, load_vae, read_text_encoder):
            refuse(read, shard, sentence)
        assert inspect(shard)["loads"] == f"no: {sentence}"
    alone = folder.parent / "m-00001-of-00001.safetensors"
    save_generator(alone, wan(), wan().config, {})
    assert equal(load_transformer(alone), wan())
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    shard.unlink()
    refuse(load_transformer, folder, "has 5 of 6 shards and no index: download the others too.")


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_variants_are_read(size, wan, tmp_path):
    model = wan()
    WanTransformer3DModel.save_pretrained(model.half(), tmp_path / "t", variant="fp16", max_shard_size=size)
    names = sorted(path.name for path in (tmp_path / "t").glob("*"))
    assert all(".fp16" in name for name in names if name != "config.json") and (len(names) > 4) == (
        size == "20KB"
    )
    assert equal(load_transformer(tmp_path / "t", dtype=torch.float32), model.float())
    model.float()
    with torch.no_grad():
        model.scale_shift_table.add_(1)
    WanTransformer3DModel.save_pretrained(model, tmp_path / "t")
    assert equal(load_transformer(tmp_path / "t"), model)  # without a variant is first


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_a_vae_of_a_variant_and_in_shards(size, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4)
    vae.save_pretrained(tmp_path / "vae", variant="bf16", max_shard_size=size)
    assert (len(list((tmp_path / "vae").glob("*.safetensors"))) > 1) == (size == "100KB")
    assert equal(load_vae(tmp_path), vae)


def test_a_text_encoder_of_a_variant(tmp_path):
    from transformers import UMT5Config, UMT5EncoderModel

    from apt_core.loading.text_files import load_text_encoder
    from apt_core.models.text import train_tokenizer

    spiece = train_tokenizer(["a red circle moving left", "a blue square on a green background"] * 20, 280)
    config = UMT5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = UMT5EncoderModel(config)
    model.save_pretrained(tmp_path / "text_encoder", variant="fp32")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece)
    (weights,) = read_text_encoder(tmp_path).weights
    assert weights.name == "model.fp32.safetensors"
    found = load_text_encoder(tmp_path, None, 64).model.shared.weight
    assert torch.equal(found, model.shared.weight)


@pytest.mark.parametrize("prefix", ["model.", "vae.", "first_stage_model."])
def test_a_vae_with_a_prefix(prefix, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4)
    save_vae(tmp_path / "a.safetensors", vae)
    tensors = load_file(tmp_path / "a.safetensors")
    prefixed = {prefix + key: value for key, value in tensors.items()}
    save_file(prefixed, tmp_path / "b.safetensors")
    assert detect_vae_layout(prefixed) == ("official", "2.1") and equal(
        load_vae(tmp_path / "b.safetensors"), vae
    )
    facts = inspect(tmp_path / "b.safetensors")
    assert (facts["what"], facts["loads"]) == (
        "Wan VAE, official keys, version 2.1",
        "yes, as the vae of Wan 2.1 models",
    )
    save_file(prefixed | {"stray": torch.ones(1)}, tmp_path / "c.safetensors")
    refuse(load_vae, tmp_path / "c.safetensors", "it is not a Wan VAE")


@pytest.mark.parametrize(
    "high, low", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")]
)
def test_which_half_is_taken_is_said(high, low, wan, tmp_path):
    first, second = wan(seed=0), wan(seed=1)
    for name, model in ((high, first), (low, second)):
        if name.startswith("transformer"):
            WanTransformer3DModel.save_pretrained(model, tmp_path / name)
        else:
            original(tmp_path / name, model)
    note = (
        f"{tmp_path} holds both halves of a Wan 2.2 A14B: {high} (high noise) is taken "
        f"and {low} (low noise) is not, because a one-step model needs only the first."
    )
    assert equal(load_transformer(tmp_path), first) and not equal(load_transformer(tmp_path), second)
    assert read_transformer(tmp_path).note == inspect(tmp_path)["note"] == note
    assert half_note(tmp_path / high) == "" and "is by its name the low-noise half" in half_note(
        tmp_path / low
    )
    assert "give the high-noise half, which a one-step model needs." in inspect(tmp_path / low)["note"]


def test_the_pipeline_says_it_once_when_it_is_opened(tmp_path, capsys, caplog):
    mini = load_transformer(SHIPPED["base"])
    for name in ("transformer", "transformer_2"):
        WanTransformer3DModel.save_pretrained(mini, tmp_path / name)
    parts = {"vae": "mini", "text_encoder": "mini", "device": "cpu"}
    told: list[str] = []
    OneStepPipeline.from_checkpoint(tmp_path, **parts, report=told.append)
    assert told == [half_note(tmp_path)] and "transformer_2 (low noise) is not" in told[0]
    OneStepPipeline.from_checkpoint(tmp_path, **parts)
    assert caplog.record_tuples == [("apt_core", logging.WARNING, half_note(tmp_path))]
    assert capsys.readouterr() == ("", "")  # a library prints nothing
    OneStepPipeline.from_checkpoint("mini", report=told.append, device="cpu")
    assert len(told) == 1


def test_a_file_of_the_other_half_is_known_by_its_name():
    for name in ("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "Wan2_2-T2V-A14B-LOW-NOISE.safetensors"):
        assert "is by its name the low-noise half of a Wan 2.2 A14B" in half_note(name)
    for name in ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.1_t2v_14B.safetensors", "mini"):
        assert half_note(name) == ""
