"""Text encoders in every form that people have: the same embeddings of each, and what is wrong with one is
said from headers, before a weight is read.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.text_keys import BLOCK, TOP, is_t5, text_to_transformers
from apt_core.loading import text_files
from apt_core.loading.sources import SHIPPED, read_text_source
from apt_core.loading.text_files import load_text_encoder, read_text_encoder
from apt_core.models.text import TIED_KEY, save_text_encoder, train_tokenizer
from trainer.checkpoints.inspect import inspect

CAPTIONS = ["a red circle moving left", "a blue square on a green background"] * 20
SIZE = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return train_tokenizer(CAPTIONS, 280)


@pytest.fixture(scope="module")
def model() -> UMT5EncoderModel:
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(**SIZE, feed_forward_proj="gated-gelu")).eval()


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a weight is a mistake."""

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(text_files, "read_tensors", refuse)


def folder_of(path: Path, model, spiece: bytes, size: str = "1GB") -> Path:
    model.save_pretrained(path / "text_encoder", max_shard_size=size)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "spiece.model").write_bytes(spiece)
    return path


def wan_names(model) -> dict[str, torch.Tensor]:
    """Under the names of Wan's own files."""
    back = {value: key for key, value in (TOP | BLOCK).items()}
    out = {}
    for key, value in model.state_dict().items():
        if key == TIED_KEY:
            continue
        if key in back:
            out[back[key]] = value
            continue
        _, _, number, rest = key.split(".", 3)
        name, _, leaf = rest.rpartition(".")
        out[f"blocks.{number}.{back[name]}.{leaf}"] = value
    return {key: value.clone() for key, value in out.items()}


def forms(tmp_path: Path, model, spiece: bytes) -> dict[str, tuple[Path, Path | None]]:
    """Path and tokenizer of each form."""
    folder = folder_of(tmp_path / "folder", model, spiece)
    shards = folder_of(tmp_path / "shards", model, spiece, "20KB")
    assert len(list((shards / "text_encoder").glob("*.safetensors"))) > 2
    save_text_encoder(tmp_path / "own.safetensors", model, spiece, 24)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(plain, tmp_path / "comfyui.safetensors")
    save_file({k: v for k, v in plain.items() if k != "shared.weight"}, tmp_path / "tied.safetensors")
    save_file(wan_names(model), tmp_path / "wan.safetensors")
    beside = folder / "tokenizer"
    return {
        "folder": (folder, None),
        "shards": (shards, None),
        "own": (tmp_path / "own.safetensors", None),
        "comfyui": (tmp_path / "comfyui.safetensors", beside),
        "tied": (tmp_path / "tied.safetensors", beside),
        "wan": (tmp_path / "wan.safetensors", beside),
    }


def test_every_form_gives_the_same_embeddings(model, spiece, tmp_path):
    found = {}
    for name, (path, tokenizer) in forms(tmp_path, model, spiece).items():
        facts = read_text_encoder(path, tokenizer)
        assert (facts.width, facts.length) == (32, 24 if name == "own" else None)
        assert facts.parameters == sum(p.numel() for p in model.parameters())
        encoder = load_text_encoder(path, tokenizer, 16)
        state = encoder.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        (found[name],) = encoder.encode(["a red square"])
    ids = torch.tensor([encoder.tokenize(["a red square"])[0]])
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    for name, embedding in found.items():
        torch.testing.assert_close(embedding, expected.detach(), rtol=1e-5, atol=1e-5, msg=name)


def test_inspect_says_of_every_form_what_it_is_for(model, spiece, tmp_path):
    for name, (path, tokenizer) in forms(tmp_path, model, spiece).items():
        facts = inspect(path / "text_encoder" if path.is_dir() else path, deep=True)
        assert "text encoder" in facts["what"]
        more = "; needs tokenizer=PATH" if tokenizer else ""
        assert facts["loads"] == f"yes, as text_encoder of width 32{more}", name
        where = {"own": "inside"}.get(name, str(path / "tokenizer" / "spiece.model"))
        assert facts["tokenizer"] == ("not inside: needs tokenizer=PATH" if tokenizer else where)


def test_a_missing_shard_is_said_before_a_weight_is_read(model, spiece, tmp_path, no_weights):
    folder = folder_of(tmp_path, model, spiece, "20KB") / "text_encoder"
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    sentence = f"{shard} is missing, which model.safetensors.index.json names: copy or download it again."
    with pytest.raises(AptError) as caught:
        read_text_source(tmp_path, None)
    assert str(caught.value) == sentence and inspect(folder)["loads"] == f"no: {sentence}"


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda t: t.pop("encoder.block.2.layer.1.DenseReluDense.wo.weight"), "wo.weight missing"),
        (lambda t: t.update({"encoder.block.1.extra": torch.ones(1)}), "encoder.block.1.extra not known"),
        (lambda t: t.update({"encoder.block.1.layer.0.layer_norm.weight": torch.ones(3)}), "has shape (3,)"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "comfyui", "own"])
def test_what_is_not_a_whole_encoder_is_said_before_a_weight_is_read(
    form, harm, sentence, model, spiece, tmp_path, no_weights
):
    path, tokenizer = forms(tmp_path, model, spiece)[form]
    file = path / "text_encoder" / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    harm(tensors)
    strings = {"config": json.dumps(dict(model.config.to_dict())), "text_length": "24"}
    save_file(tensors, file, strings if form == "own" else None)
    with pytest.raises(AptError) as caught:
        read_text_encoder(path, tokenizer)
    assert sentence in str(caught.value) and inspect(path if path.is_file() else file.parent)[
        "loads"
    ].startswith("no: ")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_t5_is_not_taken_for_a_umt5(form, spiece, tmp_path, no_weights):
    t5 = T5EncoderModel(T5Config(**SIZE, feed_forward_proj="gated-gelu"))
    path = folder_of(tmp_path, t5, spiece)
    if form == "file":
        path = tmp_path / "t5xxl.safetensors"
        save_file({key: value.clone() for key, value in t5.state_dict().items() if key != TIED_KEY}, path)
    assert is_t5(t5.state_dict())
    with pytest.raises(AptError, match=r"is a T5 \(its .* in block 0 only\), as Flux .*: give umt5_xxl\.$"):
        read_text_encoder(path, tmp_path / "tokenizer")
    facts = inspect(path if form == "file" else path / "text_encoder")
    assert facts["loads"].startswith("no: ") and "is a T5 (its" in facts["loads"]
    assert form == "folder" or facts["what"] == "T5 text encoder"


def test_names_of_wan_are_renamed_and_others_stay(model):
    state = {key for key in model.state_dict() if key != TIED_KEY}
    renamed = text_to_transformers(wan_names(model))
    assert set(renamed.values()) == state and len(renamed) == len(state)
    assert text_to_transformers(state) == {key: key for key in state}
    assert not is_t5(state)


def test_a_long_prompt_is_said_before_the_encoder_is_loaded(tmp_path, no_weights):
    pipe = OneStepPipeline.from_checkpoint("mini", cache=tmp_path)
    with pytest.raises(
        AptError, match=r'^the caption "a red circle a red .*" has \d+ tokens, but at most 32 fit'
    ):
        pipe("a red circle " * 40)
    with pytest.raises(AptError, match="tokens, but at most 32 fit"):
        pipe.stream("a red circle " * 40)


def test_of_two_lengths_the_smaller_one_holds():
    source = read_text_source(SHIPPED["text_encoder"], None)
    text = "a red circle moving left on a green background"
    source.check([text], 4096)
    with pytest.raises(AptError, match="at most 3 fit"):
        source.check([text], 3)
    with pytest.raises(AptError, match="at most 32 fit"):
        source.check([text * 9], 4096)
