"""One safetensors file, read with suspicion and written atomically. Everything that this project stores goes through here."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import AptError

FLOATS = {"F32", "F16", "BF16"}
MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Header:
    """What a file says about itself: string metadata, and shape and safetensors dtype name ("F32", "BF16", ...) by key."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header alone; no weights are read.

    Raises AptError for whatever is not a whole safetensors file: missing, empty, truncated, a pickle, a git-lfs pointer, broken JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            _refuse_foreign(path, start, length)
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise AptError(f"{path} does not exist: give the path of a .safetensors file.") from None
    except IsADirectoryError:
        raise AptError(f"{path} is a folder: give the path of a .safetensors file.") from None
    except OSError as error:
        raise AptError(f"{path} cannot be read ({error.strerror}): give the path of a readable .safetensors file.") from None
    if len(text) < length:
        raise AptError(f"{path} is truncated (its header wants {length} bytes, {len(text)} are there): copy or download it again.")
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        dtypes = {key: entry["dtype"] for key, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if not all(isinstance(n, int) for shape in shapes.values() for n in shape) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise AptError(f"{path} has a broken safetensors header: copy or download it again.") from None
    if size < end:
        raise AptError(f"{path} is truncated ({size} bytes of {end}): copy or download it again.")
    if size > end:
        raise AptError(f"{path} has {size - end} bytes too many after its last tensor: copy or download it again.")
    return Header(metadata, shapes, dtypes)


def _refuse_foreign(path: Path, start: bytes, length: int) -> None:
    # A header of 640 bytes begins like a pickle of protocol 2, so the brace after the length decides first.
    if start[8:9] == b"{" and 2 <= length <= MAX_HEADER:
        return
    if not start:
        raise AptError(f"{path} is empty: copy or download it again.")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise AptError(f"{path} is a pickle (.pt, .pth, .ckpt), which can run code when it is opened: convert it to safetensors.")
    if start.startswith(b"version https:/"):
        raise AptError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`.")
    raise AptError(f"{path} is not a safetensors file: give one, or download it again.")


def read_tensors(path: str | Path, *, floats_only: bool = True) -> tuple[dict[str, Tensor], Header]:
    """All tensors of a file, on the CPU in their stored dtypes, and its header.

    Raises AptError as `read_header` does; with `floats_only` also for a dtype other than fp32, fp16 and bf16, and always for a NaN
    or infinity in a floating-point tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    if floats_only:
        check_floats(path, header)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise AptError(f"{path} cannot be read as safetensors ({error}): copy or download it again.") from None
    check_finite(path, tensors)
    return tensors, header


def check_floats(path: str | Path, header: Header) -> None:
    """Raises AptError when a tensor is stored in anything but fp32, fp16 or bf16."""
    for key, dtype in header.dtypes.items():
        if dtype not in FLOATS:
            raise AptError(f"{path}: {key} is stored as {dtype}: only fp32, fp16 and bf16 weights can be read, not quantised ones.")


def check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises AptError that names the first tensor that holds a NaN or an infinity."""
    for key, tensor in tensors.items():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite for fp8
        if tensor.is_floating_point() and not torch.isfinite(wide).all():
            raise AptError(f"{path}: {key} holds NaN or infinite values: the training that wrote it diverged, take an earlier checkpoint.")


def check_shapes(path: str | Path, found: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]], what: str) -> None:
    """Raises AptError that names the first missing, extra or wrongly shaped key. `what`: what the file should be, for the message."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AptError(f"{path}: {missing[0]}{more} missing: the file is not a whole {what}, export or download it again.")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise AptError(f"{path}: {extra[0]}{more} not known in a {what}: give a file of that kind, or remove the extra keys.")
    for key, shape in expected.items():
        if tuple(found[key]) != tuple(shape):
            raise AptError(f"{path}: {key} has shape {tuple(found[key])}, but this {what} needs {tuple(shape)}: give a file that fits.")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `path` in one piece: a temporary file beside it, fsync, rename. A failure leaves what was there before untouched.

    Parent folders are made. Raises AptError for NaN or infinite weights and when the place cannot be written.
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(ready, partial, metadata={"format": "pt", **metadata})
        partial.chmod(mode)  # safetensors leaves a file that only its owner can read
        _sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise AptError(f"{path} could not be written ({error}): check the folder and its free space; nothing there has changed.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with suppress(OSError):  # the rename itself: not every system lets a folder be synced
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def metadata_json(path: str | Path, metadata: Mapping[str, str], name: str) -> dict:
    """The JSON object under metadata key `name`, {} when there is none. Raises AptError when it is not a JSON object."""
    try:
        value = json.loads(metadata.get(name, "{}"))
    except (ValueError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise AptError(f"{path}: its metadata entry `{name}` is not a JSON object: export the file again.")
    return value
