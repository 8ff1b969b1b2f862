"""Read weights in fp8 as ComfyUI and this project's `export --dtype fp8` store them. Any other quantised form
is refused by name.

fp8 means either the values alone, or values with a scale: `X.weight` times `X.scale_weight` (older) or
`X.weight_scale`. A scale is one number for the tensor or one per row. It comes with a marker `scaled_fp8`,
with `X.comfy_quant` (JSON as uint8), or with the metadata entry `_quantization_metadata`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AptError
from .contract import metadata_json
from .tensorfile import FLOATS, Header

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FORMATS = {"float8_e4m3fn", "float8_e5m2"}
# settings in comfy_quant that do not change the values
HARMLESS = {
    "format",
    "full_precision_matrix_mult",
    "orig_dtype",
    "orig_shape",
}
MARKER, JSON, LAYERS = "scaled_fp8", "comfy_quant", "_quantization_metadata"
SCALES = ("weight_scale", "scale_weight")
BESIDE = (*SCALES, "scale_input", "input_scale", JSON, MARKER)
"""Entries that only describe other entries, by the last part of their names. Scales of inputs are only needed
for fp8 arithmetic.
"""
FOREIGN = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "wscales": "SVDQuant",
    "weight_scale_2": "nvfp4",
    "_data": "Quanto",
    "_scale": "Quanto",
    "weight_scale_inv": "fp8 in blocks",
}
DTYPES = {"I8": "int8", "F8_E8M0": "mxfp8", "F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}


def plain_header(path: str | Path, header: Header, unscaled: Iterable[str] = ()) -> Header:
    """The header of a file as if its fp8 weights were fp32 and had no scales. The header of a file without
    fp8 is returned unchanged.

    unscaled: the last parts of the names of matrices that may be in fp8 without a scale although other
    weights have one. Reads no weight except comfy_quant. Raises AptError for weights quantised in any other
    form, for a scale that does not fit its weight, and for a missing scale.
    """
    _refuse_foreign(path, header)
    if not _is_fp8(header):
        return header
    found = {
        key: _scale(header.shapes, key)
        for key, dtype in header.dtypes.items()
        if dtype in FP8 and _leaf(key) not in BESIDE
    }
    bare = {key for key, scale in found.items() if scale is None}
    if len(bare) < len(found) or _marked(header):
        for key in bare:
            if key.endswith(".weight") and len(header.shapes[key]) == 2 and not key.endswith(tuple(unscaled)):
                raise AptError(
                    f"{path}: {key} is in fp8 and lacks the scale that others have: "
                    "download or export the file again."
                )
    for key, scale in found.items():
        if scale is not None:
            _check_scale(path, header, key, scale)
    for key in header.shapes:
        weight = f"{key.rpartition('.')[0]}.weight"
        if _leaf(key) in SCALES and header.dtypes.get(weight) in FLOATS:
            raise AptError(
                f"{path}: {weight} has a scale, but is stored as {header.dtypes[weight]}, not in fp8: "
                "download it again."
            )
    shapes = {key: shape for key, shape in header.shapes.items() if _leaf(key) not in BESIDE}
    dtypes = {key: "F32" if key in found else header.dtypes[key] for key in shapes}
    return replace(
        header,
        shapes=shapes,
        dtypes=dtypes,
        places={key: header.places[key] for key in shapes if key in header.places},
    )


def restore(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The weight under `key`. An fp8 weight becomes fp32, times its scale if it has one; others stay as
    is.
    """
    value, scale = tensors[key], _scale(tensors, key)
    if value.dtype not in FP8.values():
        return value
    if scale is None:
        return value.float()
    factor = tensors[scale].float()
    return value.float() * (
        factor.reshape(()) if factor.numel() == 1 else factor.reshape(-1, *[1] * (value.ndim - 1))
    )


def form_of(header: Header) -> str:
    """For people: "scaled fp8", "fp8", the name of another quantised form, or "" for plain weights."""
    if other := _foreign(header):
        return other
    if not _is_fp8(header):
        return ""
    return "scaled fp8" if _marked(header) or any(_leaf(key) in SCALES for key in header.shapes) else "fp8"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _is_fp8(header: Header) -> bool:
    return _marked(header) or any(dtype in FP8 for dtype in header.dtypes.values())


def _marked(header: Header) -> bool:
    return LAYERS in header.metadata or any(_leaf(key) in (MARKER, JSON) for key in header.shapes)


def _scale(names: Mapping, key: str) -> str | None:
    """The name of the entry that scales a weight."""
    module, _, leaf = key.rpartition(".")
    return (
        next((f"{module}.{name}" for name in SCALES if f"{module}.{name}" in names), None)
        if leaf == "weight"
        else None
    )


def _check_scale(path, header: Header, key: str, scale: str) -> None:
    shape, rows = header.shapes[scale], header.shapes[key][:1]
    if header.dtypes[scale] not in FLOATS or not (math.prod(shape) == 1 or shape in (rows, (*rows, 1))):
        what = f"{header.dtypes[scale]} of shape {list(shape)}"
        raise AptError(
            f"{path}: {scale} is {what}, and only one number or one a row is read: "
            "give the file in bf16 or fp16."
        )


def _foreign(header: Header) -> str:
    """The name of a quantised form other than fp8."""
    by_key = (FOREIGN[_leaf(key)] for key in header.shapes if _leaf(key) in FOREIGN)
    return next(by_key, "") or next(
        (DTYPES[dtype] for dtype in header.dtypes.values() if dtype in DTYPES), ""
    )


def _refuse_foreign(path, header: Header) -> None:
    for layer, about in _layers(path, header).items():
        strange = sorted(name for name in about if name not in HARMLESS and about[name])
        if about.get("format") not in FORMATS or strange:
            name = f"{about.get('format')}{''.join(f', {extra}' for extra in strange)}"
            raise _refusal(path, f"{layer} is quantised as {name}")
    if other := _foreign(header):
        raise _refusal(path, f"its weights are quantised as {other}")


def _refusal(path, what: str) -> AptError:
    return AptError(f"{path}: {what}, which cannot be read: give the file in bf16, fp16 or scaled fp8.")


def _layers(path, header: Header) -> dict[str, dict]:
    """What the file says of each quantised layer. Raises AptError unless these are JSON objects."""
    found = dict(metadata_json(path, header.metadata, LAYERS).get("layers", {}))
    if marked := [key for key in header.shapes if _leaf(key) == JSON]:
        with open(path, "rb") as file:
            for key in marked:
                begin, end = header.places[key]
                file.seek(begin)
                try:
                    found[key.rpartition(".")[0]] = json.loads(file.read(end - begin))
                except (ValueError, RecursionError):
                    found[key.rpartition(".")[0]] = None
    if wrong := next((layer for layer, about in found.items() if not isinstance(about, dict)), None):
        raise AptError(
            f"{path}: what it says about the quantisation of {wrong} is not a JSON object: download it again."
        )
    return found
