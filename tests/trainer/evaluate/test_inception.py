"""FID: Inception's weights through torch-fidelity, its name by the file's hash, and its mistakes."""

import importlib
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from apt_core.errors import AptError
from trainer.digest import file_digest
from trainer.evaluate import inception
from trainer.evaluate.choice import chosen, opened
from trainer.evaluate.features import Features, distance, read_networks
from trainer.evaluate.published import INCEPTION, KNOWN

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="it needs torch-fidelity")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Random weights of Inception's names and shapes, as large as keeps the features apart."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    extractor = inception._extractor(path)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        network = extractor("blank", ["2048"], feature_extractor_weights_path=empty)
    for name, weight in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(weight)
    torch.save(network.state_dict(), path)
    return path


def table(file: Path, where: Path, **settings) -> Path:
    given = {"path": str(file), "sha256": file_digest(file)} | settings
    (where / "fid.toml").write_text(
        "[[features]]\n" + "\n".join(f"{key} = {value!r}" for key, value in given.items())
    )
    return where / "fid.toml"


def clip(frames: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(frames)
    coarse = rng.integers(0, 256, (frames, height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
    return coarse.repeat(20, axis=1).repeat(20, axis=2)[:, :height, :width]


def test_its_features_are_torch_fidelitys(file, tmp_path):
    frames = clip(3, 310, 420)
    network = Features(read_networks(table(file, tmp_path))[0], CPU)
    theirs = inception._extractor(file)("theirs", ["2048"], feature_extractor_weights_path=str(file))
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)  # uint8, any size: it resizes and normalises itself
    found = network(frames)
    assert list(found) == ["fd_inception", "fd_patch_inception"]  # of another file it is no FID
    assert np.array_equal(found["fd_inception"], theirs(x)[0].double().numpy())
    patch = x[:, :, 5:304, 60:359]  # 299 pixels in the centre, as they are
    assert np.array_equal(found["fd_patch_inception"], theirs(patch)[0].double().numpy())
    assert np.ptp(found["fd_inception"], axis=0).max() > 0.1
    split = Features(read_networks(table(file, tmp_path, batch=2))[0], CPU, only=["fd_inception"])(frames)
    assert list(split) == ["fd_inception"]
    assert np.allclose(split["fd_inception"], found["fd_inception"], rtol=1e-4, atol=1e-4)


def test_a_patch_reaches_the_network_without_resizing(file, tmp_path):
    seen = []
    network = Features(read_networks(table(file, tmp_path))[0], CPU)
    network.module.extractor.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    frames = clip(1, 299, 340)
    network(frames)
    patch = torch.from_numpy(frames[:, :, 20:319]).permute(0, 3, 1, 2)
    assert [list(x.shape) for x in seen] == [[1, 3, 299, 299]] * 2
    assert torch.equal(seen[1], (patch.float() - 128) / 128)
    assert -1 <= seen[0].min() < -0.5 and 0.5 < seen[0].max() <= 1


def test_the_hash_and_not_the_name_makes_it_fid(file, tmp_path, monkeypatch):
    path = table(file, tmp_path)
    assert read_networks(path)[0].names == ("fd_inception", "fd_patch_inception")
    with pytest.raises(AptError, match=f"fid needs the weights .*6726825d.pth .SHA-256 {INCEPTION}. or "):
        chosen("fid", path)
    monkeypatch.setitem(KNOWN, file_digest(file), KNOWN[INCEPTION])
    assert read_networks(path)[0].names == ("fid", "pfid")
    assert chosen("fid", path) == ["fid"]
    (network,) = opened(["fid"], path, CPU)
    assert list(network(clip(1, 48, 48))) == ["fid"]  # too small for a patch, which nobody asked for
    small = table(file, tmp_path, patch=32)
    assert read_networks(small)[0].names == ("fid", "fd_patch_inception")
    with pytest.raises(AptError, match="pfid is of patches of 299 pixels, but .* has patch = 32"):
        chosen("fid,pfid", small)
    with pytest.raises(AptError, match="inception-2015-12-05-6726825d.pth takes frames: leave input out"):
        read_networks(table(file, tmp_path, input="clips"))


@pytest.fixture
def metric():
    """torch-fidelity's own FID. Its package imports torchvision, which FID does not use."""
    parts = ("", ".datasets", ".transforms", ".transforms.functional")
    before = {name: module for name, module in sys.modules.items() if name.startswith("torch_fidelity")}
    stands_in = {} if find_spec("torchvision") else {f"torchvision{part}": MagicMock() for part in parts}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stands_in.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("torch_fidelity.metric_fid")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]
    sys.modules.update(before)


def test_the_distance_is_torch_fidelitys(metric):
    rng = np.random.default_rng(0)
    one, other = (rng.normal(n, 1 + n, (60, 24)) @ rng.normal(size=(24, 24)) for n in range(2))
    stats = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (one, other)]
    theirs = metric.fid_statistics_to_metric(*stats, False)[metric.KEY_METRIC_FID]
    assert theirs > 10
    assert distance([one[:20], one[20:]], [other]) == pytest.approx(theirs, rel=1e-9)


class RunsSomething:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refused(file: Path, where: Path, **settings) -> str:
    with pytest.raises(AptError) as error:
        Features(read_networks(table(file, where, **settings))[0], CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pickle_runs_nothing(tmp_path):
    pickled = RunsSomething()
    pickled.folder = str(tmp_path / "made by the pickle")
    torch.save({"x": pickled}, tmp_path / "inception.pth")
    assert "inception.pth cannot be opened as TorchScript" in refused(tmp_path / "inception.pth", tmp_path)
    assert not (tmp_path / "made by the pickle").exists()


def test_mistakes_are_one_sentence(file, tmp_path, monkeypatch):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    said = refused(tmp_path / "other.pth", tmp_path)
    assert "other.pth holds weights, but not those of FID's Inception (Unexpected key(s)" in said
    assert "resizes and normalises its pixels itself: leave out size, mean of its table." in refused(
        file, tmp_path, size=299, mean=[0.5, 0.5, 0.5]
    )
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    assert "not installed: pip install --no-deps torch-fidelity." in refused(file, tmp_path)
