"""What is known of a checkpoint before any weight is read: a file's header, or the JSON file in a diffusers
folder.
"""

from dataclasses import dataclass
from pathlib import Path

from .contract import check_apt, is_lora_file, metadata_json, read_apt
from .jsonfile import read_object
from .tensorfile import Header
from .tensorfile import read_header as read_any_header


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says before any weight is read.

    header: a file's; None for a folder. apt: its `apt` object, {} for one that this project did not write.
    """

    path: Path
    header: Header | None
    apt: dict

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA, of any program. A folder is a whole model."""
        return self.header is not None and is_lora_file(self.apt, self.header.shapes)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What the file or diffusers folder at `path` says of itself. Raises AptError as `read_header` does."""
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, None, read_folder_metadata(path))
    header = read_header(path)
    return Checkpoint(path, header, metadata_json(path, header.metadata, "apt"))


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
