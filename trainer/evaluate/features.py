"""Frechet distances in the features of a network that the user has, from a TorchScript file.

A distance is called by its file's name: `fd_NAME`, and `fd_patch_NAME` of centre crops without resizing (the
paper's appendix A). It is FID only in the features of one file of weights, so nothing else is called that.
"""

import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from apt_core.errors import AptError
from trainer.config import Settings
from trainer.files import file_digest
from trainer.mini.metrics import frechet

KNOWN: dict[str, str] = {}
"""SHA-256 of published weights -> what a distance in their features is called. Empty: a file has its own
name until its hash is known for sure."""


class Network(Settings):
    """One table of the file that `--features` names.

    path: TorchScript, relative to that file. input: what it takes, "frames" `[n, 3, H, W]` or "clips"
    `[n, 3, F, H, W]`; it gives features `[n, d]`. size: pixels that frames are resized to, square (bilinear,
    antialiased); 0 for as they are. mean, std: of pixels in [0, 1], by channel. patch: side of the centre
    crops of the second distance, 0 for none. batch: frames or clips in one call.
    """

    path: Path
    sha256: str
    input: Literal["frames", "clips"] = "frames"
    size: int = Field(0, ge=0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch: int = Field(299, ge=0)
    batch: int = Field(16, ge=1)

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str) -> str:
        value = value.lower()
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise ValueError("it must be 64 hexadecimal digits")
        return value

    @property
    def name(self) -> str:
        return KNOWN.get(self.sha256, f"fd_{self.path.stem}")

    @property
    def patch_name(self) -> str:
        return f"{KNOWN[self.sha256]}_patch" if self.sha256 in KNOWN else f"fd_patch_{self.path.stem}"


def read_networks(path: Path) -> list[Network]:
    """The `[[features]]` tables of a TOML file. Raises AptError for a file that is not there or none of that,
    for weights that are not there, and for ones with another SHA-256.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AptError(
            f"--features {path} cannot be read ({error.strerror}): give a TOML file with a [[features]] "
            "table."
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AptError(f"--features {path} is not TOML ({error}): mend it.") from None
    tables = values.get("features")
    if not isinstance(tables, list) or not tables or values.keys() != {"features"}:
        raise AptError(
            f"--features {path} holds {', '.join(values) or 'nothing'}: write one [[features]] table for "
            "each network."
        )
    networks = []
    for table in tables:
        try:
            network = Network(**table)
        except (ValidationError, TypeError) as error:
            first = (
                error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            )
            where = ".".join(map(str, first["loc"])) or "a table"
            raise AptError(f"--features {path}: {where} cannot be ({first['msg']}): mend it.") from None
        networks.append(network.model_copy(update={"path": path.parent / network.path}))
    _check_files(path, networks)
    return networks


def _check_files(path: Path, networks: Sequence[Network]) -> None:
    names = [network.name for network in networks]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise AptError(f"--features {path}: two files would both be called {double}: rename one.")
    for network in networks:
        if not network.path.is_file():
            raise AptError(
                f"{network.path}, the weights of {network.name}, is not there: put the TorchScript file "
                "with SHA-256 "
                f"{network.sha256} there, or leave its table out of {path}."
            )
        if (found := file_digest(network.path)) != network.sha256:
            raise AptError(
                f"{network.path} has SHA-256 {found}, but {path} says {network.sha256}: get the right "
                "file, or mend the line."
            )


class Features:
    """A network with its weights. Raises AptError for a file that is no TorchScript."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would have its users export anew what others publish
                self.module: nn.Module = torch.jit.load(str(network.path), map_location=device).eval()
        except RuntimeError as error:
            raise AptError(
                f"{network.path} cannot be opened as TorchScript ({str(error).strip().splitlines()[0]}): "
                "save the network with torch.jit.save."
            ) from None

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Features of a clip `[F, H, W, 3]` uint8, fp64 `[n, d]` by the distance's name: of frames n is F, of
        clips 1. Raises AptError for a clip smaller than the patch, and for a network that cannot take it.
        """
        network, patch = self.network, self.network.patch
        x = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        found = {network.name: self._run(x, network.size)}
        if patch:
            height, width = x.shape[-2:]
            if min(height, width) < patch:
                raise AptError(
                    f"frames of {width}x{height} have no patch of {patch} pixels: set patch of "
                    f"{network.path.name} to "
                    f"{min(height, width)} or less, or to 0 for no {network.patch_name}."
                )
            top, left = (height - patch) // 2, (width - patch) // 2
            found[network.patch_name] = self._run(x[..., top : top + patch, left : left + patch], 0)
        return found

    def _run(self, frames: Tensor, size: int) -> np.ndarray:
        parts = [self._prepare(part, size) for part in frames.split(self.network.batch)]
        if self.network.input == "clips":
            parts = [torch.cat(parts).transpose(0, 1)[None]]
        try:
            out = torch.cat([self.module(part.to(self.device)).double().cpu() for part in parts])
        except (RuntimeError, AttributeError, TypeError) as error:
            said = str(error).strip().splitlines()[-1]
            raise AptError(
                f"{self.network.path.name} cannot take {self.network.input} of shape "
                f"{list(parts[0].shape)} ({said}): "
                "mend input, size or patch in its table."
            ) from None
        count = 1 if self.network.input == "clips" else len(frames)
        if out.ndim != 2 or len(out) != count:
            raise AptError(
                f"{self.network.path.name} gives {list(out.shape)} where [{count}, d] is needed: end it "
                "with pooled features."
            )
        return out.numpy()

    def _prepare(self, frames: Tensor, size: int) -> Tensor:
        x = frames.float() / 255
        if size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (self.network.mean, self.network.std))
        return (x - mean) / std


def check_count(name: str, width: int, counts: dict[str, int]) -> None:
    """Raises AptError where a side (its words -> feature vectors) has too few for a covariance of full rank,
    which takes one more than the features have channels.
    """
    for side, count in counts.items():
        if count <= width:
            raise AptError(
                f"{name} needs {width + 1} feature vectors of {side}, one more than it has channels, and "
                "there would be "
                f"{count}: give more prompts, a higher --count or more real clips, or leave fd out."
            )


def distance(real: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, each given in parts `[n, d]`."""
    return frechet(np.concatenate(real), np.concatenate(made))
