"""The files of a training state: each is written with a digest, and reading them never runs code.

torch.distributed.checkpoint stores its index as a pickle, and what it calls bytes as another pickle inside.
Unpickling runs whatever the file says. So the index is read by an unpickler that accepts only the index's own
classes, and a state with anything but tensors in it is refused.
"""

import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from apt_core.errors import AptError
from apt_core.files.jsonfile import read_object
from trainer.digest import file_digest
from trainer.run.folders import FACTS, STATE

# a single process is fine, for a reader of states too
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.9's own writer of states uses it
DIGESTS = "__{}.sha256"  # one per process, until they are collected in run.json
DATA = re.compile(r"__\d+_\d+\.distcp")
MAX_INDEX = 1 << 30  # bytes; the index for 14B parameters on 1,024 GPUs has a fifth of that
ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
REMEDY = "take another state; if you delete this one, its run continues from the one before it"
DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class DamagedState(AptError):
    """Files of a training state that are not what the trainer wrote."""


def _known(module: str, name: str):
    if module == "torch" and name in DTYPES:
        return getattr(torch, name)
    if (module, name) not in ALLOWED:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no training state of this trainer has")
    if module.startswith("pathlib"):
        return _path  # where it was saved, which nobody needs; another system's paths cannot even be created
    return getattr(__import__(module, fromlist=[name]), name)


def _path(*parts) -> str:
    return "/".join(map(str, parts))


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler: unlike the C one, a wrong number in a file cannot make it allocate all memory.

    It also refuses what runs no code but does harm: setting attributes of a class, and deeply nested tuples,
    whose hash takes for ever.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        return _known(module, name)

    def _build(self) -> None:
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError("it changes a class")
        pickle._Unpickler.load_build(self)

    def _tuple(self, load) -> None:
        load(self)
        _check_depth(self.stack[-1])

    dispatch[pickle.BUILD[0]] = _build
    for _code, _load in (
        (pickle.TUPLE, "load_tuple"),
        (pickle.TUPLE1, "load_tuple1"),
        (pickle.TUPLE2, "load_tuple2"),
        (pickle.TUPLE3, "load_tuple3"),
    ):
        dispatch[_code[0]] = lambda self, _load=getattr(pickle._Unpickler, _load): self._tuple(_load)


def _check_depth(value: tuple, left: int = 4) -> None:
    if not left:
        raise pickle.UnpicklingError("it has tuples within tuples")
    for item in value:
        if type(item) is tuple:
            _check_depth(item, left - 1)


class StateReader(FileSystemReader):
    """Reads the tensors of one state. digests: SHA-256 of its files, from run.json.

    Raises DamagedState if the index has anything but tensors in it, does not match the files, or names a file
    that is not in `digests`.
    """

    def __init__(self, path: Path, digests: dict | None = None) -> None:
        super().__init__(path)
        self._digests = digests or {}
        self._metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """The index, read once. Called before `torch.distributed.checkpoint.load`, which hides what is raised
        here behind an error of its own, it says what is wrong with a state.
        """
        self._metadata = self._metadata or self._read()
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def _read(self) -> Metadata:
        path = Path(self.path) / STATE
        try:
            size = path.stat().st_size
            if size > MAX_INDEX:
                raise DamagedState(
                    f"{path} has {size >> 20} MiB, too much for an index: "
                    "give a state that the trainer wrote."
                )
            raw = path.read_bytes()
            metadata = _Unpickler(io.BytesIO(raw)).load()
        except DamagedState:
            raise
        except OSError as error:
            raise DamagedState(
                f"{path} cannot be read ({error.strerror or error}): give a state that the trainer wrote."
            ) from None
        except Exception as error:  # an unpickler can raise anything
            raise DamagedState(
                f"{path} is not the index of a training state ({_short(error)}): "
                "give one that the trainer wrote."
            ) from None
        try:
            problem = _problem(metadata, Path(self.path))
        except (TypeError, ValueError, AttributeError, KeyError, OSError, OverflowError) as error:
            problem = _short(error)
        if problem:
            raise DamagedState(
                f"{self.path} is not a whole training state ({problem}): give one that the trainer wrote."
            )
        _check_listed(metadata, self._digests)
        return metadata


class StateWriter(FileSystemWriter):
    """Writes the tensors, and beside them the digests of this process's files."""

    def write_data(self, plan, planner):
        future = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in future.value()})
        digests = {name: file_digest(Path(self.path) / name) for name in names}
        (Path(self.path) / DIGESTS.format(plan.storage_data.prefix.strip("_"))).write_text(
            json.dumps(digests), encoding="utf-8"
        )
        return future


def read_facts(path: Path, remedy: str) -> dict:
    """The contents of a state's run.json: identity, update, the steps of each part, rows, and the digests of
    the files. Raises AptError if it is missing or damaged. remedy: the end of that message, what to do.
    """
    facts = read_object(path / FACTS, remedy)
    kinds = {"identity": dict, "update": int, "steps": dict, "rows": list}
    good = all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
    if (
        not good
        or not isinstance(facts.get("files", {}), dict)
        or not all(
            type(number) is int and number >= 0 for number in (facts["update"], *facts["steps"].values())
        )
        or not all(isinstance(row, dict) for row in facts["rows"])
    ):
        raise AptError(f"{path / FACTS} is damaged: {remedy}.")
    return facts


def gather_digests(folder: Path) -> dict[str, str]:
    """The digests of all files of a state that has just been written, including its index. Deletes the files
    in which the processes noted them.
    """
    found = {STATE: file_digest(folder / STATE)}
    for path in sorted(folder.glob(DIGESTS.format("*"))):
        found |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return found


def check_digests(folder: Path, digests: dict, names: Iterable[str]) -> None:
    """Raises DamagedState for the first of these files that is missing or has changed since it was written.
    States of versions without digests have none to check.
    """
    for name in names:
        path = folder / name
        if not (name == STATE or DATA.fullmatch(name)) or path.is_symlink() or not path.is_file():
            raise DamagedState(f"{folder} lacks the file {_short(name)}: {REMEDY}.")
        try:
            same = file_digest(path) == digests[name]
        except OSError as error:
            raise DamagedState(
                f"{folder / name} cannot be read ({error.strerror or error}): {REMEDY}."
            ) from None
        if not same:
            raise DamagedState(f"{folder / name} has changed since it was written: {REMEDY}.")


def _check_listed(metadata: Metadata, digests: dict) -> None:
    """Raises DamagedState if there are digests, but none for a file that the index names."""
    named = {info.relative_path for info in metadata.storage_data.values()}
    if digests and not named | {STATE} <= digests.keys():
        raise DamagedState(
            f"the index names {min(named - digests.keys(), default=STATE)}, "
            "but run.json has no digest for it: "
            f"{REMEDY}."
        )


def _problem(metadata, folder: Path) -> str:
    """What is wrong with an index, or how the files differ from it; "" if it can be read."""
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.state_dict_metadata, dict)
        or not isinstance(metadata.storage_data, dict)
    ):
        return "its index has another form"
    sizes: dict[str, int] = {}
    ends: dict[str, int] = {}
    stored: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not (isinstance(name, str) and DATA.fullmatch(name)) or info.transform_descriptors:
            return f"its index names a file {_short(name)}"
        if name not in sizes:
            path = folder / name
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            sizes[name] = path.stat().st_size
        if not (
            isinstance(info.offset, int)
            and isinstance(info.length, int)
            and 0 <= info.offset
            and 0 < info.length
        ):
            return f"{name} has a part of no size"
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
        stored[index.fqn] = stored.get(index.fqn, 0) + info.length
    for name, end in ends.items():
        if sizes[name] != end:
            return f"{name} has {sizes[name]:,} bytes and not {end:,}"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            return f"{_short(name)} is no tensor"
        size, dtype = tuple(entry.size), entry.properties.dtype
        if (
            not isinstance(name, str)
            or not isinstance(dtype, torch.dtype)
            or not all(isinstance(n, int) and n >= 0 for n in size)
        ):
            return f"{_short(name)} is no tensor"
        if math.prod(size) * dtype.itemsize > stored.get(name, 0):
            return f"{_short(name)} of {list(size)} is larger than what is stored of it"
    return ""


def _short(value: object) -> str:
    return (
        " ".join(str(value).split())[:120]
        if isinstance(value, str | int | BaseException)
        else f"of type {type(value).__name__}"
    )
