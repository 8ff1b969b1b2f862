"""The text encoder: tokens for any text, embeddings as WanPipeline makes them, and its one-file form."""

import copy
import json
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.errors import AptError
from apt_core.files.tensorfile import read_header
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.text import TextEncoder, clean_prompt, save_text_encoder, train_tokenizer

CAPTIONS = [
    f"a {c} {s} moving {d}"
    for c in ("red", "green", "blue")
    for s in ("circle", "square")
    for d in ("left", "right", "up", "down")
] * 5
LENGTH = 24


@pytest.fixture(scope="module")
def pieces():
    return train_tokenizer(CAPTIONS, 284)


@pytest.fixture(scope="module")
def model():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=284, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1)
    ).eval()


@pytest.fixture
def file(model, pieces, tmp_path):
    save_text_encoder(tmp_path / "text.safetensors", model, pieces, LENGTH)
    return tmp_path / "text.safetensors"


@pytest.fixture
def text(file):
    return load_text_encoder(file)


def test_tokenizer_is_deterministic_and_silent(pieces, capfd):
    assert train_tokenizer(CAPTIONS, 284) == pieces
    assert capfd.readouterr() == ("", "")


def test_tokens(text):
    (row,) = text.tokenize(["a red circle moving left"])
    assert row[-1] == 1 and row.count(1) == 1 and 0 not in row and 2 not in row
    assert text.tokenize([""]) == [[1]]


@pytest.mark.parametrize(
    "caption", ["🎈🎉", "一只红色的圆", "naïve Ωμέγα", "a\u0301", "0x41 <unk> </s> <0x41>", "#@!~`\\\"'{}[]|"]
)
def test_any_text_has_tokens_and_comes_back(text, caption):
    (row,) = text.tokenize([caption])
    assert 2 not in row and 0 not in row and row.count(1) == 1
    assert text.tokenizer.pieces.decode(row[:-1]) == unicodedata.normalize("NFKC", caption)


@pytest.fixture
def no_ftfy(monkeypatch):
    """WanPipeline without ftfy, installed or not; diffusers up to 0.36 calls it either way."""
    monkeypatch.setattr(
        "diffusers.pipelines.wan.pipeline_wan.ftfy", SimpleNamespace(fix_text=str), raising=False
    )


def test_cleaning_is_that_of_wan_pipeline(no_ftfy):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in ("  a\n\tred   circle ", "salt &amp;amp; pepper", "a &lt;b&gt;&nbsp;c", ""):
        assert clean_prompt(prompt) == prompt_clean(prompt)
    assert clean_prompt(" salt &amp;amp;\n pepper ") == "salt & pepper"


def test_embeddings_equal_the_stock_pipeline(double, no_ftfy, text, model, pieces):
    from diffusers import WanPipeline

    text.model.double()
    model = copy.deepcopy(model).double()
    prompts = ["a red circle moving left", "a  blue &amp; green square", ""]

    def tokenizer(texts, max_length, **_):
        rows = [[*text.tokenizer.pieces.encode(t), 1] for t in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())

    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=model, _execution_device="cpu")
    with torch.no_grad():
        expected = WanPipeline._get_t5_prompt_embeds(pipeline, prompts, max_sequence_length=LENGTH)
    encoded = text.encode(prompts)
    got = text.pad(encoded, LENGTH)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for e, row, tokens in zip(encoded, got, text.tokenize(prompts)):
        assert e.shape == (len(tokens), 16)
        assert not row[len(tokens) :].any()


def test_embeddings_do_not_depend_on_company(double, text):
    text.model.double()
    captions = ["a red circle moving left", "a", "a green square moving down"]
    for alone, together in zip((text.encode([c])[0] for c in captions), text.encode(captions, batch=2)):
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_pad_refuses_what_does_not_fit():
    assert TextEncoder.pad([torch.ones(2, 3), torch.ones(4, 3)], 5).shape == (2, 5, 3)
    with pytest.raises(AptError, match="4 rows"):
        TextEncoder.pad([torch.ones(4, 3)], 3)


def test_caption_too_long(text):
    caption = "a red circle moving left " * 20
    with pytest.raises(AptError, match=f"a red circle .* tokens, but at most {LENGTH}"):
        text.encode(["a", caption])
    (short,) = text.encode([caption], truncate=True)
    assert short.shape == (LENGTH, 16)
    (full,), (cut,) = text.tokenize([caption]), text.tokenize([caption], truncate=True)
    assert cut == full[: LENGTH - 1] + [1], "as transformers truncates: the end mark stays"


def test_file_holds_everything(file, model, pieces, text):
    header = read_header(file)
    assert "encoder.embed_tokens.weight" not in header.shapes and header.shapes["shared.weight"] == (284, 16)
    assert header.dtypes["spiece_model"] == "U8" and header.metadata["text_length"] == str(LENGTH)
    assert bytes(load_file(file)["spiece_model"].tolist()) == pieces
    assert json.loads(header.metadata["config"])["d_model"] == 16 == text.dim
    assert text.model.encoder.embed_tokens.weight is text.model.shared.weight
    assert all(torch.equal(value, text.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert not text.model.training and text.text_length == LENGTH


@pytest.mark.parametrize("dtype, stored", [(torch.bfloat16, "BF16"), (torch.float64, "F64")])
def test_a_file_of_any_floats_is_read_as_fp32(dtype, stored, model, pieces, tmp_path):
    file = tmp_path / "text.safetensors"
    save_text_encoder(file, copy.deepcopy(model).to(dtype), pieces, LENGTH)
    assert read_header(file).dtypes["shared.weight"] == stored
    read = load_text_encoder(file)
    assert torch.equal(read.model.shared.weight, model.shared.weight.to(dtype).float())
    assert read.model.shared.weight.dtype == read.encode(["a"])[0].dtype == torch.float32


def test_vocabulary_that_does_not_suit():
    with pytest.raises(AptError, match="9999"):
        train_tokenizer(CAPTIONS, 9999)
    with pytest.raises(AptError, match="100"):
        train_tokenizer(CAPTIONS, 100)


@pytest.mark.parametrize(
    "change, metadata, words",
    [
        (lambda t: t.pop("spiece_model"), {}, ["carries no tokenizer"]),
        (lambda t: t.update(spiece_model=torch.arange(9, dtype=torch.uint8)), {}, ["sentencepiece"]),
        (
            lambda t: t.pop("encoder.final_layer_norm.weight"),
            {},
            ["encoder.final_layer_norm.weight", "missing"],
        ),
        (lambda t: t.update(extra=torch.ones(1)), {}, ["extra"]),
        (lambda t: t.update({"shared.weight": torch.ones(284, 8)}), {}, ["shared.weight", "(284, 8)"]),
        (lambda t: t["shared.weight"].fill_(float("inf")), {}, ["shared.weight", "NaN or infinite"]),
        (None, {"config": "{"}, ["`config`"]),
        (None, {"config": '{"d_model": 16}'}, ["vocab_size"]),
        (None, {"config": {"num_layers": "two"}}, ["`config`"]),
        (None, {"config": {"vocab_size": 100}}, ["shared.weight"]),
        (None, {"text_length": "many"}, ["text_length", "many"]),
    ],
)
def test_files_that_cannot_be_used(file, change, metadata, words):
    tensors, strings = load_file(file), dict(read_header(file).metadata)
    if change:
        change(tensors)
    if isinstance(metadata.get("config"), dict):
        metadata = {"config": json.dumps(json.loads(strings["config"]) | metadata["config"])}
    save_file(tensors, file, metadata=strings | metadata)
    with pytest.raises(AptError) as caught:
        load_text_encoder(file)
    message = str(caught.value)
    assert all(word in message for word in (str(file), *words)) and "\n" not in message, message


def test_tokenizer_larger_than_the_encoder(model, file):
    tensors, strings = load_file(file), dict(read_header(file).metadata)
    tensors["shared.weight"] = tensors["shared.weight"][:280].clone()
    strings["config"] = json.dumps(json.loads(strings["config"]) | {"vocab_size": 280})
    save_file(tensors, file, metadata=strings)
    with pytest.raises(AptError, match="284 pieces"):
        load_text_encoder(file)
