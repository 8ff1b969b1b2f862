"""Frechet distances: against closed forms, in the features of a user's TorchScript file, and its mistakes."""

import numpy as np
import pytest
from own_networks import CPU, ClipMeans, network, table
from scipy.linalg import sqrtm

from apt_core.errors import AptError
from trainer.digest import file_digest
from trainer.evaluate.features import Features, check_count, distance, read_networks
from trainer.mini.clips import draw


def exact(mean: np.ndarray, cov: np.ndarray, n: int = 400) -> np.ndarray:
    """`[n, d]` with this very mean and covariance."""
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_the_distance_of_gaussians_is_the_closed_form():
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    means = np.array([1.0, 2.0]), np.array([4.0, -2.0])
    wanted = 9 + 16 + np.trace(a + b - 2 * sqrtm(a @ b).real)
    parts = np.split(exact(means[0], a), 4)  # the parts of a set are one set
    assert distance(parts, [exact(means[1], b)]) == pytest.approx(wanted, rel=1e-9)
    # of variances that commute: |m|^2 + sum (s_a - s_b)^2
    diagonal = [exact(np.zeros(2), np.diag([4.0, 9.0]))], [exact(np.zeros(2), np.diag([1.0, 1.0]))]
    assert distance(*diagonal) == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-9)
    assert distance(diagonal[0], diagonal[0]) == pytest.approx(0, abs=1e-9)


def test_features_are_of_normalised_pixels(tmp_path):
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    clip[1, :, :4] = (255, 51, 0)
    found = network(tmp_path, mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))(clip)
    assert list(found) == ["fd_means"]
    wanted = [[-1, -2, 0, -1], [(0.5 - 0.5) / 0.5, (0.1 - 0.2) / 0.1, 0, 1]]
    assert np.allclose(found["fd_means"], wanted, atol=1e-6)


def test_a_patch_is_the_centre_as_it_is_and_the_whole_is_resized(tmp_path):
    clip = np.zeros((1, 10, 12, 3), np.uint8)
    clip[0, 3:7, 4:8] = 255  # just the patch
    found = network(tmp_path, patch=4, size=5, mean=(0.0,) * 3, std=(1.0,) * 3)(clip)
    assert np.allclose(found["fd_patch_means"], 1)
    assert np.allclose(found["fd_means"][0, :3], 16 / 120, atol=0.02)


def test_features_do_not_depend_on_the_batch(tmp_path):
    clip = draw(1, [0], True)[0][0]
    one, all_at_once = (network(tmp_path, batch=batch, patch=24)(clip) for batch in (1, 16))
    for name in ("fd_means", "fd_patch_means"):
        assert one[name].shape == (9, 4)
        assert np.allclose(one[name], all_at_once[name], rtol=0, atol=1e-6)


def test_a_network_of_clips_sees_all_frames(tmp_path):
    clip = np.zeros((5, 8, 8, 3), np.uint8)
    clip[4] = 255
    found = network(tmp_path, module=ClipMeans, name="clips", input="clips", batch=2)(clip)
    assert np.allclose(found["fd_clips"], [[-1, 1]])


def refused(path) -> str:
    with pytest.raises(AptError) as error:
        read_networks(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_other_weights_are_named_with_their_hash(tmp_path):
    path = table(tmp_path)
    digest = file_digest(tmp_path / "means.pt")
    (tmp_path / "means.pt").rename(tmp_path / "away.pt")
    said = refused(path)
    assert f"{tmp_path / 'means.pt'}, the weights of fd_means, does not exist" in said
    assert f"put the file with SHA-256 {digest} there" in said
    (tmp_path / "means.pt").write_bytes(b"other")
    assert f"has SHA-256 {file_digest(tmp_path / 'means.pt')}, but {path} says {digest}" in refused(path)


def test_a_table_that_is_none_is_refused(tmp_path):
    assert "sha256 is not valid (Value error, it must be 64 hexadecimal digits)" in refused(
        table(tmp_path, sha256="12")
    )
    assert "input is not valid" in refused(table(tmp_path, input="sound"))
    assert "crop is not valid" in refused(table(tmp_path, crop=3))
    path = table(tmp_path)
    path.write_text(path.read_text() * 2)
    assert "two files would both be called fd_means: rename or remove one." in refused(path)
    path.write_text("[[network]]\n")
    assert "holds network: write one [[features]] table" in refused(path)
    path.write_text("features")
    assert "is not valid TOML" in refused(path)
    assert "cannot be read" in refused(tmp_path / "none.toml")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(
        AptError, match="frames of 8x8 are smaller than a patch of 299 pixels: set patch of means.pt to 8 or"
    ):
        network(tmp_path, patch=299)(clip)
    with pytest.raises(AptError, match=r"means.pt failed on clips of shape \[1, 3, 2, 8, 8\]|returns"):
        network(tmp_path, input="clips")(clip)
    (tmp_path / "means.pt").write_bytes(b"not a network")
    path = tmp_path / "features.toml"
    path.write_text(f'[[features]]\npath = "means.pt"\nsha256 = "{file_digest(tmp_path / "means.pt")}"\n')
    with pytest.raises(AptError, match="means.pt cannot be opened as TorchScript"):
        Features(read_networks(path)[0], CPU)


def test_too_few_samples_say_how_many_are_needed():
    check_count("fd_x", 4, {"the real clips": 5, "each model": 5})
    with pytest.raises(
        AptError, match="fd_x needs 5 feature vectors of each model, .* but there would be 4:"
    ):
        check_count("fd_x", 4, {"the real clips": 5, "each model": 4})
