"""The header of a checkpoint file, and what stands beside a diffusers folder: all that is known before a
weight is read.
"""

from pathlib import Path

from .contract import check_apt, metadata_json, read_apt
from .jsonfile import read_object
from .tensorfile import Header
from .tensorfile import read_header as read_any_header


def read_header(path: str | Path) -> Header:
    """Metadata, shapes and dtypes of a checkpoint file, without reading a weight.

    Raises AptError for whatever is not whole safetensors, and for a contract that cannot be understood:
    broken JSON in `apt` or `config`, an unknown kind, a format newer than this version's.
    """
    header = read_any_header(path)
    read_apt(path, header.metadata)
    metadata_json(path, header.metadata, "config")
    return header


def read_metadata(path: str | Path) -> dict:
    """The `apt` object of a checkpoint file, {} for one that this project did not write. Raises AptError as
    `read_header` does.
    """
    return metadata_json(path, read_header(path).metadata, "apt")


def read_folder_metadata(path: Path) -> dict:
    """The `apt` object beside a diffusers folder, {} where there is none. Raises AptError as `read_header`
    does.
    """
    about = path / "apt.json"
    apt = read_object(about, "export it again, or delete that file") if about.is_file() else {}
    check_apt(about, apt)
    return apt
