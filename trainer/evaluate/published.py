"""The published files of weights whose Frechet distances have a name of their own, known by their SHA-256.

A distance is only called FID, PFID or FVD in the features of one of these files. In any other file's features
it has that file's name.
"""

from dataclasses import dataclass
from typing import Literal

from .metrics import FID, FRECHET_LITE0, FVD, PFID

PATCH = 299
"""Side of the paper's centre crops in pixels (appendix A), which is the side of Inception's input."""


@dataclass(frozen=True)
class Published:
    """One file.

    file: its name where it is published.
    distance: the name of the distance in its features; patch: of that on centre crops of 299 pixels, without
    resizing.
    input: "frames" or "clips", see `features.Network`.
    """

    file: str
    distance: str
    patch: str | None = None
    input: Literal["frames", "clips"] = "frames"


LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SCRIPT = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
I3D = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
KNOWN: dict[str, Published] = {
    LITE0: Published("efficientnet-lite0.pth", FRECHET_LITE0),
    # torch-fidelity's, which pytorch-fid publishes as pt_inception-2015-12-05-6726825d.pth
    INCEPTION: Published("weights-inception-2015-12-05-6726825d.pth", FID, PFID),
    # StyleGAN2-ADA's, the same weights as TorchScript
    INCEPTION_SCRIPT: Published("inception-2015-12-05.pt", FID, PFID),
    # StyleGAN-V's
    I3D: Published("i3d_torchscript.pt", FVD, input="clips"),
}


def files_of(distance: str) -> list[tuple[str, str]]:
    """Name and SHA-256 of the published files in whose features a distance is called so."""
    return [(p.file, digest) for digest, p in KNOWN.items() if distance in (p.distance, p.patch)]
