"""Text encoders from where people have them: the file of ComfyUI, a folder of transformers or diffusers, or this project's own file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AptError
from ..files.jsonfile import read_object
from ..files.tensorfile import check_finite, check_shapes, read_header
from ..models.text import TIED_KEY, TOKENIZER_KEY, TextEncoder, load_text_encoder

SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")


@dataclass(frozen=True)
class TextFacts:
    """What is known before a weight is read. width: of an embedding; parameters: how many; weights, tokenizer: the files."""

    width: int
    parameters: int
    weights: tuple[Path, ...]
    tokenizer: Path


def read_text_encoder(path: str | Path, tokenizer: str | Path | None = None) -> TextFacts:
    """The facts of a text encoder, from headers and configs alone. Raises AptError as `load_text_encoder_files` does for what shows there."""
    path = Path(path)
    if path.is_dir():
        folder, spiece = _folder(path)
        weights = tuple(sorted(folder.glob("*.safetensors")))
        try:
            width = read_object(folder / "config.json", "")["d_model"]
        except (OSError, ValueError, KeyError, TypeError):
            weights = ()
        if not weights:
            raise AptError(f"text_encoder {folder} is not a folder of a UMT5 encoder (config.json and .safetensors): download it again.")
    else:
        weights, shapes = (path,), read_header(path).shapes
        width, spiece = _umt5_fields(path, shapes)["d_model"], path if TOKENIZER_KEY in shapes else None
    if tokenizer:
        spiece = _find_spiece(Path(tokenizer).expanduser())
    if spiece is None:
        raise _no_tokenizer(path)
    count = sum(torch.Size(shape).numel() for file in weights for shape in read_header(file).shapes.values())
    return TextFacts(width, count, weights, spiece)


def load_text_encoder_files(path: str | Path, tokenizer: str | Path | None, text_length: int) -> TextEncoder:
    """A text encoder with its tokenizer, on the CPU.

    path: a file of apt_core.models.text.save_text_encoder; ComfyUI's (umt5_xxl_fp16, or fp8_e4m3fn_scaled, which is unpacked); a folder of
    transformers or diffusers (text_encoder and tokenizer below it). tokenizer: the folder of its spiece.model, or that file, where the
    encoder does not carry one. Weights stored in 16 or 8 bits are kept in bf16, others in fp32.
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


def unpack_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8 as bf16: `X.weight` times `X.scale_weight` (or `X.weight_scale`), without the entries that only describe it."""
    out = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in SCALES:
            continue
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = tensors.get(f"{module}.scale_weight", tensors.get(f"{module}.weight_scale", torch.ones(())))
            value = (value.float() * scale.float()).bfloat16()
        out[key] = value
    return out


def _folder(path: Path) -> tuple[Path, Path | None]:
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    places = (path / "tokenizer" / "spiece.model", folder.parent / "tokenizer" / "spiece.model", folder / "spiece.model")
    return folder, next((place for place in places if place.is_file()), None)


def _from_folder(path: Path):
    from transformers import UMT5EncoderModel

    folder, spiece = _folder(path)
    try:
        model, report = UMT5EncoderModel.from_pretrained(folder, local_files_only=True, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises a dozen types
        raise AptError(f"text_encoder {folder} is not a folder of a UMT5 encoder ({' '.join(str(error).split())}): download it again.") from None
    if missing := sorted(set(report["missing_keys"]) - {TIED_KEY}):
        raise AptError(f"text_encoder {folder}: {missing[0]} missing: it is not a whole UMT5 encoder, download it again.")
    return model.to(_compute_dtype(model.dtype)), spiece and spiece.read_bytes()


def _from_file(path: Path):
    from safetensors.torch import load_file
    from transformers import UMT5Config, UMT5EncoderModel

    tensors = load_file(path)
    spiece = bytes(tensors.pop(TOKENIZER_KEY).tolist()) if TOKENIZER_KEY in tensors else None
    tensors = {key: value for key, value in unpack_fp8(tensors).items() if key != TIED_KEY}
    if wrong := next((key for key, value in tensors.items() if not value.is_floating_point()), None):
        raise AptError(f"text_encoder {path}: {wrong} is stored as {tensors[wrong].dtype}, which this cannot read: give a file in fp16, bf16 or scaled fp8.")
    check_finite(path, tensors)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**_umt5_fields(path, shapes), dropout_rate=0.0))
    expected = {key: value.shape for key, value in model.state_dict().items() if key != TIED_KEY}
    check_shapes(path, shapes, expected, "UMT5 encoder")
    dtype = _compute_dtype(tensors["shared.weight"].dtype)
    weights = {key: torch.nn.Parameter(value.to(dtype, copy=True), requires_grad=False) for key, value in tensors.items()}
    model.load_state_dict({**weights, TIED_KEY: weights["shared.weight"]}, assign=True)
    return model, spiece


def _umt5_fields(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """UMT5Config's arguments, from the shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise AptError(f"text_encoder {path}: {key} missing: it is not a UMT5 encoder, give the file that ComfyUI uses for Wan.")
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
        raise AptError(f"tokenizer {path} does not exist or holds no spiece.model: give the folder of the tokenizer, or that file.")
    return found


def _no_tokenizer(path: Path) -> AptError:
    return AptError(f"text_encoder {path} carries no tokenizer: add tokenizer=PATH of its folder, or of its spiece.model.")


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored == torch.float32 else torch.bfloat16
