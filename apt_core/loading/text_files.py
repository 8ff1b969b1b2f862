"""Load text encoders in the forms that people have: ComfyUI's file, a folder of transformers or diffusers, or
this project's own file.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..errors import AptError
from ..files.contract import metadata_json
from ..files.folders import pickle_hint, refuse_shard, weight_files
from ..files.jsonfile import read_object
from ..files.quantised import plain_header, restore
from ..files.tensorfile import FLOATS, Header, check_count, check_shapes, read_header, read_tensors
from ..files.text_keys import refuse_t5, text_to_transformers
from ..models.text import (
    CONFIG_FIELDS,
    TIED_KEY,
    TOKENIZER_KEY,
    TextEncoder,
)

STEM = "model"  # begins the names of the weight files in a folder of transformers
EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "relative_attention_bias.weight",
    "token_embedding.weight",
    "pos_embedding.embedding.weight",
)
"""Tables that are looked up and not multiplied with; in fp8 files they have no scales."""


@dataclass(frozen=True)
class TextFacts:
    """What is known before any weight is read. width: of an embedding; parameters: how many; weights,
    tokenizer: the files; length: the most tokens of a text, if the encoder states it.
    """

    width: int
    parameters: int
    weights: tuple[Path, ...]
    tokenizer: Path | None
    length: int | None = None


def read_text_encoder(path: str | Path, tokenizer: str | Path | None = None) -> TextFacts:
    """The facts about a text encoder, from headers and configs alone. Raises AptError as
    `load_text_encoder` does, except for values of weights and the contents of the tokenizer.
    """
    facts = find_text_encoder(path)
    if tokenizer:
        facts = replace(facts, tokenizer=_find_spiece(Path(tokenizer).expanduser()))
    if facts.tokenizer is None:
        raise _no_tokenizer(Path(path))
    return facts


def find_text_encoder(path: str | Path) -> TextFacts:
    """As `read_text_encoder`, but the encoder may lack its tokenizer, which is then None."""
    return _checked(Path(path)).facts


def load_text_encoder(
    path: str | Path, tokenizer: str | Path | None = None, text_length: int = 512
) -> TextEncoder:
    """Load a text encoder with its tokenizer, on the CPU.

    path: a file of apt_core.models.text.save_text_encoder; ComfyUI's file (umt5_xxl_fp16, or
    fp8_e4m3fn_scaled, which is unpacked); a file in Wan's own names; or a folder of transformers or diffusers
    (with subfolders text_encoder and tokenizer).
    tokenizer: the folder of its spiece.model, or that file, when the encoder's file holds none.
    text_length: the number of rows that the transformer was trained on, 512 for Wan.
    Weights stored in 16 or 8 bits become bf16, others fp32. Those of a file of save_text_encoder become fp32,
    and its own text_length replaces the argument.
    Raises AptError for weights that are not a whole UMT5 encoder, for metadata of a file of save_text_encoder
    that does not describe one, and for a tokenizer that is missing, damaged or of another encoder.
    """
    facts = read_text_encoder(path, tokenizer)
    found, tensors = _checked(Path(path)), {}
    for file in facts.weights:
        tensors |= read_tensors(file, floats_only=False)[0]
    dtype = _compute_dtype(tensors[found.names["shared.weight"]].dtype)
    weights = {}
    for name, key in found.names.items():
        value = restore(tensors, key)
        value = value.float() if facts.length else value.to(dtype, copy=True)
        weights[name] = torch.nn.Parameter(value, requires_grad=False)
    found.model.load_state_dict({**weights, TIED_KEY: weights["shared.weight"]}, assign=True)
    if facts.tokenizer is None:
        raise _no_tokenizer(Path(path))
    spiece = read_spiece(facts.tokenizer)
    try:
        return TextEncoder(found.model, spiece, facts.length or text_length)
    except AptError as error:
        raise AptError(f"{facts.tokenizer}: {error}") from None


def read_spiece(path: Path) -> bytes:
    """The sentencepiece model from its own file or from an encoder's. Raises AptError for a file that cannot
    be read.
    """
    if path.suffix != ".safetensors":
        try:
            return path.read_bytes()
        except OSError as error:
            raise AptError(
                f"tokenizer {path} cannot be read ({error.strerror or error}): give a spiece.model."
            ) from None
    begin, end = read_header(path).places[TOKENIZER_KEY]
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


@dataclass(frozen=True)
class _Checked:
    """model: on device "meta"; names: the model's keys, except the tied one, and those in the files."""

    facts: TextFacts
    model: nn.Module
    names: dict[str, str]


def _checked(path: Path) -> _Checked:
    """Make all checks that headers and configs allow; the same for every form of an encoder."""
    length, spiece, files = None, None, (path,)
    if path.is_dir():
        folder, spiece = _folder(path)
        fields, files = _folder_config(folder)
    else:
        refuse_shard(path)
    shapes, names = {}, {}
    for file in files:
        header = _plain(file)
        renamed = text_to_transformers(header.shapes)
        names |= {name: key for key, name in renamed.items()}
        shapes |= {renamed[key]: shape for key, shape in header.shapes.items()}
    if TOKENIZER_KEY in shapes:
        spiece = path
    for key in (TOKENIZER_KEY, *([TIED_KEY] if "shared.weight" in shapes else [])):
        shapes.pop(key, None)
        names.pop(key, None)
    if TIED_KEY in shapes:  # the file has it only under its other name
        shapes["shared.weight"], names["shared.weight"] = shapes.pop(TIED_KEY), names.pop(TIED_KEY)
    refuse_t5(f"text_encoder {path}", shapes)
    if path.is_dir():
        for key in [key for key in shapes if key.startswith(("decoder.", "lm_head."))]:  # a whole UMT5
            del shapes[key], names[key]
        check_count(folder, "num_layers", fields["num_layers"], shapes)
        model = _meta_encoder(f"text_encoder {folder}", fields, "its config.json")
    elif "text_length" in read_header(path).metadata:
        model, length = _own_encoder(path, read_header(path))
    else:
        model = _meta_encoder(f"text_encoder {path}", _umt5_fields(path, shapes))
    expected = {key: value.shape for key, value in model.state_dict().items() if key != TIED_KEY}
    check_shapes(f"text_encoder {path}", shapes, expected, "UMT5 encoder")
    count = sum(math.prod(shape) for shape in expected.values())
    return _Checked(TextFacts(model.config.d_model, count, files, spiece, length), model, names)


def _folder(path: Path) -> tuple[Path, Path | None]:
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    places = (
        path / "tokenizer" / "spiece.model",
        folder.parent / "tokenizer" / "spiece.model",
        folder / "spiece.model",
    )
    return folder, next((place for place in places if place.is_file()), None)


def _folder_config(folder: Path) -> tuple[dict, tuple[Path, ...]]:
    """UMT5Config's fields and the weight files."""
    weights = any(folder.glob(f"{STEM}*.safetensors*"))
    if not (folder / "config.json").is_file() or not weights:
        what = f"is not a folder of a UMT5 encoder (config.json and .safetensors){pickle_hint(folder)}"
        raise AptError(f"text_encoder {folder} {what}: download it again, in safetensors.")
    remedy = "download it again"
    config = read_object(folder / "config.json", remedy)
    if absent := next((name for name in ("d_model", "num_layers") if name not in config), None):
        raise AptError(
            f"text_encoder {folder} is not a folder of a UMT5 encoder, its config.json "
            f"lacks {absent}: {remedy}."
        )
    fields = {name: config[name] for name in CONFIG_FIELDS if name in config}
    return fields, tuple(weight_files(folder, STEM))


def _own_encoder(path: Path, header: Header):
    """The UMT5EncoderModel of a file of `save_text_encoder`, on device "meta", and its text_length. Raises
    AptError for metadata that does not describe an encoder.
    """
    fields = metadata_json(path, header.metadata, "config")
    text_length = header.metadata["text_length"]
    if not (text_length.isdecimal() and len(text_length) < 10) or int(text_length) < 2:
        raise AptError(
            f"{path}: its metadata entry `text_length` is {text_length or 'empty'}: "
            "it must be the number of tokens, 2 or more."
        )
    if absent := [name for name in CONFIG_FIELDS if name not in fields]:
        raise AptError(
            f"{path}: its metadata entry `config` lacks {absent[0]}: "
            "write the file again with save_text_encoder."
        )
    if isinstance(fields["num_layers"], int):
        check_count(path, "num_layers", fields["num_layers"], header.shapes)
    model = _meta_encoder(path, {name: fields[name] for name in CONFIG_FIELDS}, "its metadata entry `config`")
    return model, int(text_length)


def _plain(path: Path) -> Header:
    """The header of an encoder's file, without the entries that only describe fp8.

    Raises AptError for weights that are not floats.
    """
    header = plain_header(path, read_header(path), EMBEDDINGS)
    for key, dtype in header.dtypes.items():
        if dtype not in FLOATS | {"F64"} and key != TOKENIZER_KEY:
            instead = "give a file in fp16, bf16 or scaled fp8"
            raise AptError(
                f"text_encoder {path}: {key} is stored as {dtype}, which cannot be read: {instead}."
            )
    return header


def _umt5_fields(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """UMT5Config's arguments, told from the shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise AptError(
                f"text_encoder {path}: {key} missing: it is not a UMT5 encoder, "
                "give the file that ComfyUI uses for Wan."
            )
        return shapes[key]

    first = "encoder.block.0.layer."
    vocabulary, width = shape("shared.weight")
    buckets, heads = shape(f"{first}0.SelfAttention.relative_attention_bias.weight")
    layers = len({key.split(".")[2] for key in shapes if key.startswith("encoder.block.")})
    check_count(path, "num_layers", layers, shapes)
    if not heads:
        raise AptError(
            f"text_encoder {path} has no attention heads: give the file that ComfyUI uses for Wan."
        )
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{first}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{first}1.DenseReluDense.wi_0.weight")[0],
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _meta_encoder(path: str | Path, fields: dict, where: str = "its config"):
    """Build a UMT5EncoderModel from these fields of UMT5Config on device "meta". For fields that do not
    describe an encoder it raises AptError, which says `where` they stand.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    try:
        config = UMT5Config(**fields, dropout_rate=0.0)
        with torch.device("meta"):
            return UMT5EncoderModel(config)
    except Exception as error:  # transformers checks the fields with exception types of several libraries
        reason = " ".join(str(error).split())
        raise AptError(
            f"{path}: {where} does not describe a UMT5 encoder ({reason}): write the file again."
        ) from None


def _find_spiece(path: Path) -> Path:
    places = (path / "spiece.model", path / "tokenizer" / "spiece.model") if path.is_dir() else (path,)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise AptError(
            f"tokenizer {path} does not exist or holds no spiece.model: "
            "give the folder of the tokenizer, or that file."
        )
    return found


def _no_tokenizer(path: Path) -> AptError:
    return AptError(
        f"text_encoder {path} carries no tokenizer: add tokenizer=PATH of its folder, or of its spiece.model."
    )


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored in (torch.float32, torch.float64) else torch.bfloat16
