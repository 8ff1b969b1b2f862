"""Inception v3 for FID: torch-fidelity's network and preprocessing, with weights from a local file."""

import io
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.errors import AptError

PACKAGE = "torch_fidelity"


class Inception(nn.Module):
    """Frames `[n, 3, H, W]` in levels 0 to 255 -> the 2,048 pooled features. torch-fidelity resizes them to
    299 x 299 as TensorFlow 1 did, and normalises them.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        return self.extractor(x.to(torch.uint8))[0]


def open_inception(path: Path) -> Inception | None:
    """The network with the weights in a file of torch.save; None if the file holds no tensors by name.

    Raises AptError if their names or shapes are not Inception's, or torch-fidelity is not installed.
    """
    try:  # torch-fidelity itself would run a pickle
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the unpickler trips over
        return None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        return None
    checked = io.BytesIO()
    torch.save(dict(state), checked)
    checked.seek(0)
    extractor = _extractor(path)
    try:
        return Inception(extractor("inception", ["2048"], feature_extractor_weights_path=checked)).eval()
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1].strip().rstrip(". ")
        raise AptError(
            f"{path} holds weights, but not those of FID's Inception ({said}): of another network, save the "
            "network itself with torch.jit.save."
        ) from None


def _extractor(path: Path) -> type:
    """torch-fidelity's class. Only its module is imported: the package as a whole imports torchvision, which
    not every build of torch has, and whose wrong build breaks diffusers.
    """
    whole = PACKAGE in sys.modules
    if not whole:
        if (spec := find_spec(PACKAGE)) is None:
            raise AptError(
                f"{path} holds weights for the Inception of the package torch-fidelity, which is not "
                "installed: pip install --no-deps torch-fidelity."
            )
        sys.modules[PACKAGE] = module_from_spec(spec)
    try:
        return import_module(f"{PACKAGE}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        if not whole:
            del sys.modules[PACKAGE]  # whoever wants the package gets it whole
