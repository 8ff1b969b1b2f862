"""What is known of a checkpoint before any weight is read: a file's header, or the JSON file in a diffusers
folder.
"""

from pathlib import Path

from .contract import check_apt, metadata_json, read_apt
from .jsonfile import read_object
from .tensorfile import Header
from .tensorfile import read_header as read_any_header


def read_header(path: str | Path) -> Header:
    """The metadata, shapes and dtypes of a checkpoint file; reads no weight.

    Raises AptError for a file that is not whole safetensors, and for metadata that cannot be understood:
    broken JSON in `apt` or `config`, an unknown kind, or a newer format than this version reads.
    """
    header = read_any_header(path)
    read_apt(path, header.metadata)
    metadata_json(path, header.metadata, "config")
    return header


def read_metadata(path: str | Path) -> dict:
    """The `apt` object of a checkpoint file, or {} for a file that this project did not write. Raises
    AptError as `read_header` does.
    """
    return metadata_json(path, read_header(path).metadata, "apt")


def read_folder_metadata(path: Path) -> dict:
    """The `apt` object beside a diffusers folder, or {} when there is none. Raises AptError as `read_header`
    does.
    """
    about = path / "apt.json"
    apt = read_object(about, "export it again, or delete that file") if about.is_file() else {}
    check_apt(about, apt)
    return apt
