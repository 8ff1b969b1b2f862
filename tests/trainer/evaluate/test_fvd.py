"""FVD: a TorchScript network that is called as StyleGAN-V calls its I3D, and its name by the file's hash."""

import json
import re

import numpy as np
import pytest
import torch
from own_networks import network, table
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from apt_core.errors import AptError
from apt_core.files.media_write import write_video
from trainer.__main__ import app
from trainer.digest import file_digest
from trainer.evaluate.features import distance, read_networks
from trainer.evaluate.published import I3D, KNOWN
from trainer.mini.clips import draw


class StandIn(nn.Module):
    """Takes what i3d_torchscript.pt takes: clips `[n, 3, F, H, W]` in levels with `rescale`, of any size with
    `resize`. Features `[n, 2]` with `return_features`, else classes `[n, 3]`.
    """

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        frames = x.size(2)
        if resize:
            x = F.interpolate(x, [frames, 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        assert x.size(3) == 224 and x.size(4) == 224 and bool(x.abs().max() <= 1)
        features = torch.stack(
            [x[:, 0].mean((1, 2, 3)), (x[:, 1, 1:] - x[:, 1, :-1]).abs().mean((1, 2, 3))], 1
        )
        return features if return_features else torch.ones(x.size(0), 3)


def by_hand(clip: np.ndarray) -> list[float]:
    x = F.interpolate(torch.from_numpy(clip).permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear")
    x = 2 * x / 255 - 1
    return [float(x[:, 0].mean()), float((x[1:, 1] - x[:-1, 1]).abs().mean())]


def published(where, patch, **settings):
    """A table for a file that counts as the published one."""
    path = table(where, StandIn, "i3d", **{"patch": None} | settings)
    patch.setitem(KNOWN, file_digest(where / "i3d.pt"), KNOWN[I3D])
    return path


def test_it_is_called_as_stylegan_v_does(tmp_path):
    made = draw(1, range(3), True)[0]
    features = network(tmp_path, module=StandIn, name="i3d", input="clips")
    assert features.flags == {"return_features": True, "rescale": True, "resize": True}
    for clip in made:
        found = features(clip)
        assert list(found) == ["fd_i3d"]  # of another file it is no FVD
        assert np.allclose(found["fd_i3d"], [by_hand(clip)], atol=1e-5)


def test_the_hash_makes_it_fvd(tmp_path, monkeypatch):
    path = published(tmp_path, monkeypatch)
    (network,) = read_networks(path)
    assert (network.names, network.input, network.patch) == (("fvd",), "clips", 0)
    with pytest.raises(AptError, match="i3d_torchscript.pt takes clips: leave input out"):
        read_networks(published(tmp_path, monkeypatch, input="frames"))


def test_its_value_is_the_formula_on_the_features(tmp_path, monkeypatch):
    path, out = published(tmp_path, monkeypatch), tmp_path / "out"
    (tmp_path / "real").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green circle")
    for number, clip in enumerate(draw(3, range(3), True)[0]):
        write_video(tmp_path / "real" / f"{number}.mp4", clip, 8, crf=8, pixel_format="yuv444p")
    given = ["mini", "--prompts", tmp_path / "prompts.txt", "--data", tmp_path / "real", "--metrics", "fvd"]
    run = CliRunner().invoke(app, ["evaluate", *map(str, given), "--features", str(path), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = json.loads((out / "evaluation.json").read_text())
    value = result["models"][0]["metrics"]["fvd"]["value"]
    assert list(result["models"][0]["metrics"]) == ["fvd"] and value > 0
    assert set(result["features"][0]) == {"name", "file", "sha256", "input", "patch", "batch"}
    assert re.search(
        r"<td>FVD<small>Frechet distance to the real clips", (out / "evaluation.html").read_text()
    )

    from apt_core.engine.pipeline import OneStepPipeline
    from trainer.data.media import read_video
    from trainer.mini import GENERATOR

    prompts = ["a red circle", "a blue square", "a green circle"]
    made = [video.frames for video in OneStepPipeline.from_checkpoint(GENERATOR)(prompts, seed=0)]
    real = [read_video(tmp_path / "real" / f"{n}.mp4", 9, 8, 48, 48) for n in range(3)]
    sets = [np.array([by_hand(clip) for clip in clips]) for clips in (real, made)]
    means, covs = [x.mean(0) for x in sets], [np.cov(x, rowvar=False) for x in sets]
    wanted = np.sum((means[0] - means[1]) ** 2) + np.trace(
        covs[0] + covs[1] - 2 * sqrtm(covs[0] @ covs[1]).real
    )
    assert value == pytest.approx(wanted, rel=1e-3)
    assert distance([sets[0]], [sets[1]]) == pytest.approx(wanted, rel=1e-6)
