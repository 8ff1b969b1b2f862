"""Read one safetensors file with every check, and write one atomically. Everything that this project stores
in safetensors goes through this module.
"""

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AptError, NotFinite, and_more
from .atomic import replacing

FLOATS = {"F32", "F16", "BF16"}
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
MAX_RANK = 16
MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Header:
    """What a file says about itself: its metadata (strings), and by key the shape, the safetensors dtype name
    ("F32", "BF16", ...) and the place, as the first byte in the file and the one after the last.
    """

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Read the header alone, without weights.

    Raises AptError for anything that is not a whole safetensors file: missing, empty, truncated, a pickle, a
    git-lfs pointer, broken JSON.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a pipe would wait
            raise AptError(f"{path} is not a file: give the path of a .safetensors file.")
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            _refuse_foreign(path, start, length)
            file.seek(8)
            text = file.read(length)
    except AptError:  # it is itself a ValueError
        raise
    except FileNotFoundError:
        raise AptError(f"{path} does not exist: give the path of a .safetensors file.") from None
    except IsADirectoryError:
        raise AptError(f"{path} is a folder: give the path of a .safetensors file.") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise AptError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): "
            "give the path of a readable .safetensors file."
        ) from None
    if len(text) < length:
        raise AptError(
            f"{path} is truncated (its header wants {length} bytes, {len(text)} are there): "
            "copy or download it again."
        )
    try:
        entries = json.loads(text, object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not all text")
        parts = {key: _part(key, entry) for key, entry in entries.items()}
        end = 8 + length + max((part.end for part in parts.values()), default=0)
        problem = _gap(parts)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = f" ({error})" if type(error) is ValueError else ""
        raise AptError(
            f"{path} has a broken safetensors header{reason}: copy or download it again."
        ) from None
    if size < end:
        raise AptError(f"{path} is truncated ({size} bytes of {end}): copy or download it again.")
    if problem:
        raise AptError(f"{path} has a broken safetensors header ({problem}): copy or download it again.")
    if size > end:
        raise AptError(
            f"{path} has {size - end} bytes too many after its last tensor: copy or download it again."
        )
    return Header(
        metadata,
        {key: part.shape for key, part in parts.items()},
        {key: part.dtype for key, part in parts.items()},
        {key: (8 + length + part.begin, 8 + length + part.end) for key, part in parts.items()},
    )


class _Part(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def _once(pairs: list[tuple[str, object]]) -> dict:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name appears in it twice")
    return out


def _part(key: str, entry: Mapping) -> _Part:
    """Read the entry of one tensor. Raises ValueError or KeyError when it does not describe a tensor."""
    shape, dtype, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not key.isprintable():
        raise ValueError("a name has control characters")
    if (
        type(shape) is not list
        or len(shape) > MAX_RANK
        or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    ):
        raise ValueError(f"{key} has no shape")
    if type(dtype) is not str or dtype not in BITS:
        raise ValueError(f"{key} is of an unknown kind")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{key} has another size than its shape")
    return _Part(tuple(shape), dtype, begin, end)


def _gap(parts: Mapping[str, _Part]) -> str:
    """What is wrong with the places of the tensors, which must fill the file without gaps; "" when nothing
    is.
    """
    place = 0
    for key, part in sorted(parts.items(), key=lambda item: (item[1].begin, item[1].end)):
        if part.begin != place:
            return f"{key} {'overlaps another tensor' if part.begin < place else 'leaves a gap before it'}"
        place = part.end
    return ""


def check_count(path: str | Path, name: str, value: object, shapes: Mapping) -> None:
    """Raise AptError for a number of layers, from a config or from names, that is too large for the tensors
    in the file: such a model must not be built.
    """
    if type(value) is not int or not 1 <= value <= len(shapes):
        raise AptError(
            f"{path}: its config has {name} {value!r}, but the file holds {len(shapes)} tensors: "
            "export or download it again."
        )


def _refuse_foreign(path: Path, start: bytes, length: int) -> None:
    # A header of 640 bytes begins like a pickle of protocol 2, so the brace after the length decides first.
    if start[8:9] == b"{" and 2 <= length <= MAX_HEADER:
        return
    if not start:
        raise AptError(f"{path} is empty: copy or download it again.")
    if start[:4] == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        raise AptError(
            f"{path} is a pickle (.pt, .pth, .ckpt), which can run code when it is opened: "
            "convert it to safetensors."
        )
    if start.startswith(b"version https:/"):
        raise AptError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`.")
    if start.startswith(b"GGUF"):
        instead = "give the model in safetensors (bf16, fp16 or scaled fp8)"
        raise AptError(f"{path} is a GGUF file, whose quantised weights are not read: {instead}.")
    raise AptError(f"{path} is not a safetensors file: give one, or download it again.")


def read_tensors(path: str | Path, *, floats_only: bool = True) -> tuple[dict[str, Tensor], Header]:
    """All tensors of a file, on the CPU in their stored dtypes, and its header.

    Raises AptError as `read_header` does, with `floats_only` also for any dtype other than fp32, fp16 and
    bf16, and NotFinite for a NaN or infinity in a floating-point tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    if floats_only:
        check_floats(path, header)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise AptError(
            f"{path} cannot be read as safetensors ({error}): copy or download it again."
        ) from None
    check_finite(path, tensors)
    return tensors, header


def check_floats(path: str | Path, header: Header) -> None:
    """Raise AptError when a tensor is stored in anything but fp32, fp16 or bf16."""
    for key, dtype in header.dtypes.items():
        if dtype not in FLOATS:
            raise AptError(
                f"{path}: {key} is stored as {dtype}: only fp32, fp16 and bf16 weights can be read, "
                "not quantised ones."
            )


def check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NotFinite, naming the first tensor that holds a NaN or an infinity."""
    for key, tensor in tensors.items():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite for fp8
        if tensor.is_floating_point() and not torch.isfinite(wide).all():
            raise NotFinite(
                f"{path}: {key} holds NaN or infinite values: the training that wrote it diverged, "
                "take an earlier checkpoint."
            )


def check_shapes(
    path: str | Path, found: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]], what: str
) -> None:
    """Raise AptError, naming the first missing, extra or wrongly shaped key. `what`: the kind of file that is
    expected, for the message.
    """
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing:
        raise AptError(
            f"{path}: {and_more(missing)} missing: the file is not a whole {what}, "
            "export or download it again."
        )
    if extra:
        raise AptError(
            f"{path}: {and_more(extra)} not known in a {what}: "
            "give a file of that kind, or remove the extra keys."
        )
    for key, shape in expected.items():
        if tuple(found[key]) != tuple(shape):
            raise AptError(
                f"{path}: {key} has shape {tuple(found[key])}, but this {what} needs {tuple(shape)}: "
                "give a file that fits."
            )


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `path` in one piece: a temporary file beside it, fsync, rename. When this fails, a file that was
    there before stays as it was.

    Missing parent folders are made. Raises NotFinite for NaN or infinite weights, and AptError when the file
    cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    check_finite(path, tensors)
    ready, seen = {}, set()
    for key, tensor in tensors.items():
        ready[key] = tensor.detach().cpu().contiguous()
        # Views and tied weights get memory of their own: safetensors refuses to guess about shared storage.
        storage = ready[key].untyped_storage().data_ptr()
        if storage in seen:
            ready[key] = ready[key].clone()
        seen.add(storage)
    with replacing(path, durable=True, also=(SafetensorError,)) as partial:
        save_file(ready, partial, metadata={"format": "pt", **metadata})
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file in place. safetensors writes it in random order, so that equal weights
    would give unequal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
