"""Sample videos while a network trains: the right weights, and no trace in the training."""

from functools import partial

import numpy as np
import pytest
import torch
from layouts import SHAPE, TEXT_DIM, TEXT_LENGTH, Layout, assert_close, run_layout

from apt_core.loading.checkpoint import load_transformer
from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from trainer.data.media import read_image
from trainer.machines.parallel import Parallel
from trainer.stages.samples import Samples

TEXT = torch.linspace(-1, 1, 2 * TEXT_LENGTH * TEXT_DIM).reshape(2, TEXT_LENGTH, TEXT_DIM)


def record(path, latents):
    """A stand-in for the VAE, that keeps what it was given."""
    torch.save([*(torch.load(path) if path.exists() else []), latents], path)
    return np.full((1, 1, 16, 16, 3), len(torch.load(path)) * 10, np.uint8)


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(2, Parallel(microbatch=1, generator_zero=2))], ids=["one", "two"]
)
def test_raw_weights_beside_their_average(layout, files, tmp_path):
    samples = Samples(
        tmp_path / "samples", 5, TEXT, SHAPE, partial(record, tmp_path / "latents.pt"), 8, seed=4
    )
    run_layout(files, layout, tmp_path / "watched", options={"samples": samples})
    run_layout(files, layout, tmp_path / "unwatched")
    assert_close(tmp_path / "watched", tmp_path / "unwatched", 5, 0)

    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000005-00.png",
        "000005-01.png",
    ]
    pixels = read_image(tmp_path / "samples" / "000005-01.png", 16, 32)[0]
    assert (pixels[:, :16] == 30).all() and (pixels[:, 16:] == 40).all()
    raw, mean = torch.load(tmp_path / "latents.pt")[2:]
    z = sample_noise([1], SHAPE, 4, "samples/z")
    with torch.no_grad():
        expected = one_step(load_transformer(tmp_path / "watched" / "generator.safetensors"), z, TEXT[1:])
    assert torch.allclose(mean, expected, atol=1e-5)
    assert (raw - mean).abs().max() > 1e-4
