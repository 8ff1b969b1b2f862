"""Load APT Text Encoder in a real ComfyUI: stock CLIP Text Encode then gives the embeddings of
apt_core.models.text.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import UMT5Config, UMT5EncoderModel

from apt_core.files.tensorfile import read_tensors
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.text import TextEncoder, save_text_encoder, train_tokenizer
from trainer.mini import ASSETS

PACK = Path(__file__).parents[2]
CAPTIONS = [
    "a red circle moving left on a green background",
    "",
    "a yellow triangle\nmoving  up, on a purple background",
    "Ünknown wörds: 圆",
]
BUILT_IN = ASSETS / "text_encoder.safetensors"


@pytest.fixture(scope="module")
def run(comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    files = folder / "files"
    spiece = train_tokenizer([f"{caption} {i}" for i in range(500) for caption in CAPTIONS], 300)
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=300,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    save_text_encoder(files / "other.safetensors", UMT5EncoderModel(config).eval(), spiece, 64)

    tensors, header = read_tensors(files / "other.safetensors", floats_only=False)
    metadata, fields = header.metadata, json.loads(header.metadata["config"])
    whole = (files / "other.safetensors").read_bytes()
    (files / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (files / "pickle.pt").write_bytes(b"\x80\x02}q\x00.")
    save_file(
        {key: value for key, value in tensors.items() if key != "spiece_model"},
        files / "no tokenizer.safetensors",
        metadata,
    )
    save_file(
        tensors,
        files / "eps.safetensors",
        metadata | {"config": json.dumps(fields | {"layer_norm_epsilon": 1e-5})},
    )
    save_file(tensors, files / "length.safetensors", metadata | {"text_length": "many"})
    save_file(tensors, files / "foreign.safetensors")
    without = {
        key: value
        for key, value in tensors.items()
        if not key.endswith("block.2.layer.0.SelfAttention.q.weight")
    }
    save_file(without, files / "missing.safetensors", metadata)
    result = comfyui(
        "encode_texts", pack=PACK, files=files, captions=json.dumps(CAPTIONS), out=folder / "out.safetensors"
    )
    return files, load_file(folder / "out.safetensors"), result


@pytest.mark.parametrize("name", ["apt_mini_text_encoder", "other.safetensors"])
def test_embeddings_are_those_of_the_training(run, name):
    files, embeddings, _ = run
    encoder = load_text_encoder(BUILT_IN if name == "apt_mini_text_encoder" else files / name)
    rows = encoder.encode(CAPTIONS)
    expected = TextEncoder.pad(rows, encoder.text_length)
    assert len({len(row) for row in rows}) > 2
    for i in range(len(CAPTIONS)):
        assert_close(embeddings[f"{name} {i}"], expected[i : i + 1], rtol=0, atol=1e-5)


def test_every_weight_is_there_and_prompt_weights_work(run):
    assert run[2]["complaints"] == [] and run[2]["weighted"]


def test_the_built_in_encoder_is_first_in_the_list(run):
    assert run[2]["listed"] == ["apt_mini_text_encoder", *sorted(file.name for file in run[0].iterdir())]


def test_bad_files_get_a_sentence(run):
    files, _, result = run
    name, again = "AptError Load APT Text Encoder:", "copy or download it again."
    small = "is missing, or ComfyUI's UMT5 cannot take it: write the file again with the trainer."
    size = (files / "half.safetensors").stat().st_size
    assert result["sentences"] == {
        "eps.safetensors": f"{name} eps.safetensors: layer_norm_epsilon {small}",
        "foreign.safetensors": (
            f"{name} foreign.safetensors is neither a UMT5-XXL with its tokenizer, as Wan has it, "
            "nor a text encoder that the trainer wrote: choose a umt5_xxl file for Wan, "
            "or apt_mini_text_encoder for the miniature."
        ),
        "half.safetensors": (
            f"{name} half.safetensors is truncated ({size} bytes of "
            f"{(files / 'other.safetensors').stat().st_size}): {again}"
        ),
        "length.safetensors": f"{name} length.safetensors: text_length {small}",
        "missing.safetensors": (
            f"{name} missing.safetensors: encoder.block.2.layer.0.SelfAttention.q.weight {small}"
        ),
        "no tokenizer.safetensors": f"{name} no tokenizer.safetensors: spiece_model {small}",
        "nowhere.safetensors": (
            f"{name} nowhere.safetensors is not in models/text_encoders: "
            "put the file there, or choose another one."
        ),
        "pickle.pt": (
            f"{name} pickle.pt is a pickle (.pt, .pth, .ckpt), which can run code when it is opened: "
            "convert it to safetensors."
        ),
    }
