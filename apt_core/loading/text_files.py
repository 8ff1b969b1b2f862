"""Text encoders from where people have them: the file of ComfyUI, a folder of transformers or diffusers, or
this project's own file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import AptError
from ..files.folders import pickle_hint, refuse_shard, variant_of, weight_files
from ..files.jsonfile import read_object
from ..files.quantised import plain_header, restore
from ..files.tensorfile import FLOATS, Header, check_shapes, read_header, read_tensors
from ..models.text import TIED_KEY, TOKENIZER_KEY, TextEncoder, load_text_encoder

STEM = "model"  # of the weights' names in a folder of transformers
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")
"""Matrices that are looked up in and not multiplied with: in files of fp8 they have no scales."""


@dataclass(frozen=True)
class TextFacts:
    """What is known before a weight is read. width: of an embedding; parameters: how many; weights,
    tokenizer: the files.
    """

    width: int
    parameters: int
    weights: tuple[Path, ...]
    tokenizer: Path


def read_text_encoder(path: str | Path, tokenizer: str | Path | None = None) -> TextFacts:
    """The facts of a text encoder, from headers and configs alone. Raises AptError as
    `load_text_encoder_files` does for what shows there.
    """
    path = Path(path)
    if path.is_dir():
        folder, spiece = _folder(path)
        try:
            width = read_object(folder / "config.json", "")["d_model"]
            weights = tuple(weight_files(folder, STEM))
        except (ValueError, KeyError):
            what = "is not a folder of a UMT5 encoder (config.json and .safetensors)"
            what += pickle_hint(folder)
            raise AptError(f"text_encoder {folder} {what}: download it again, in safetensors.") from None
    else:
        weights, shapes = (path,), _plain(path).shapes
        width, spiece = _umt5_fields(path, shapes)["d_model"], path if TOKENIZER_KEY in shapes else None
    if tokenizer:
        spiece = _find_spiece(Path(tokenizer).expanduser())
    if spiece is None:
        raise _no_tokenizer(path)
    count = sum(torch.Size(shape).numel() for file in weights for shape in read_header(file).shapes.values())
    return TextFacts(width, count, weights, spiece)


def load_text_encoder_files(path: str | Path, tokenizer: str | Path | None, text_length: int) -> TextEncoder:
    """A text encoder with its tokenizer, on the CPU.

    path: a file of apt_core.models.text.save_text_encoder; ComfyUI's (umt5_xxl_fp16, or fp8_e4m3fn_scaled,
    which is unpacked); a folder of transformers or diffusers (text_encoder and tokenizer below it).
    tokenizer: the folder of its spiece.model, or that file, where the encoder does not carry one. Weights
    stored in 16 or 8 bits are kept in bf16, others in fp32.
    Raises AptError for weights that are not a whole UMT5 encoder, and when no tokenizer is found.
    """
    path = Path(path)
    if path.is_dir():
        model, spiece = _from_folder(path)
    elif "text_length" in read_header(path).metadata:
        return load_text_encoder(path)
    else:
        model, spiece = _from_file(path)
    if tokenizer:
        spiece = _find_spiece(Path(tokenizer).expanduser()).read_bytes()
    if spiece is None:
        raise _no_tokenizer(path)
    return TextEncoder(model.requires_grad_(False), spiece, text_length)


def _folder(path: Path) -> tuple[Path, Path | None]:
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    places = (
        path / "tokenizer" / "spiece.model",
        folder.parent / "tokenizer" / "spiece.model",
        folder / "spiece.model",
    )
    return folder, next((place for place in places if place.is_file()), None)


def _from_folder(path: Path):
    from transformers import UMT5EncoderModel

    folder, spiece = _folder(path)
    try:
        variant = variant_of(folder, STEM)
        # Its type does not tell that output_loading_info makes it two.
        model, report = cast(Any, UMT5EncoderModel).from_pretrained(
            folder, local_files_only=True, dtype="auto", output_loading_info=True, variant=variant
        )
    except Exception as error:  # transformers raises a dozen types
        raise AptError(
            f"text_encoder {folder} is not a folder of a UMT5 encoder ({' '.join(str(error).split())}): download it again."
        ) from None
    if missing := sorted(set(report["missing_keys"]) - {TIED_KEY}):
        raise AptError(
            f"text_encoder {folder}: {missing[0]} missing: it is not a whole UMT5 encoder, download it again."
        )
    return model.to(_compute_dtype(model.dtype)), spiece and spiece.read_bytes()


def _from_file(path: Path):
    from transformers import UMT5Config, UMT5EncoderModel

    shapes = {
        key: shape for key, shape in _plain(path).shapes.items() if key not in (TOKENIZER_KEY, TIED_KEY)
    }
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**_umt5_fields(path, shapes), dropout_rate=0.0))
    expected = {key: value.shape for key, value in model.state_dict().items() if key != TIED_KEY}
    check_shapes(path, shapes, expected, "UMT5 encoder")
    tensors, _ = read_tensors(path, floats_only=False)
    spiece = bytes(tensors[TOKENIZER_KEY].tolist()) if TOKENIZER_KEY in tensors else None
    dtype = _compute_dtype(tensors["shared.weight"].dtype)
    found = {key: restore(tensors, key).to(dtype, copy=True) for key in shapes}
    weights = {key: torch.nn.Parameter(value, requires_grad=False) for key, value in found.items()}
    model.load_state_dict({**weights, TIED_KEY: weights["shared.weight"]}, assign=True)
    return model, spiece


def _plain(path: Path) -> Header:
    """The header of an encoder's file without what only describes fp8.

    Raises AptError for weights that are not floats, and for a shard.
    """
    refuse_shard(path)
    header = plain_header(path, read_header(path), EMBEDDINGS)
    for key, dtype in header.dtypes.items():
        if dtype not in FLOATS and key != TOKENIZER_KEY:
            instead = "give a file in fp16, bf16 or scaled fp8"
            raise AptError(f"text_encoder {path}: {key} is stored as {dtype}, which is not read: {instead}.")
    return header


def _umt5_fields(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """UMT5Config's arguments, from the shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise AptError(
                f"text_encoder {path}: {key} missing: it is not a UMT5 encoder, give the file that ComfyUI uses for Wan."
            )
        return shapes[key]

    first = "encoder.block.0.layer."
    vocabulary, width = shape("shared.weight")
    buckets, heads = shape(f"{first}0.SelfAttention.relative_attention_bias.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{first}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{first}1.DenseReluDense.wi_0.weight")[0],
        "num_layers": len({key.split(".")[2] for key in shapes if key.startswith("encoder.block.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _find_spiece(path: Path) -> Path:
    places = (path / "spiece.model", path / "tokenizer" / "spiece.model") if path.is_dir() else (path,)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise AptError(
            f"tokenizer {path} does not exist or holds no spiece.model: give the folder of the tokenizer, or that file."
        )
    return found


def _no_tokenizer(path: Path) -> AptError:
    return AptError(
        f"text_encoder {path} carries no tokenizer: add tokenizer=PATH of its folder, or of its spiece.model."
    )


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored == torch.float32 else torch.bfloat16
