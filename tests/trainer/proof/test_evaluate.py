"""The columns of the report, by value."""

import pytest
import torch

from apt_core.files.checkpoint_header import read_metadata
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.method.flow import sample_noise
from apt_core.method.generator import few_step, one_step
from apt_core.method.steps import step_times
from trainer.config import load_preset
from trainer.mini import ASSETS, GENERATOR
from trainer.proof.evaluate import Models, Sampler, network_calls

SHAPE = (16, 1, 6, 6)


@pytest.mark.parametrize("about, second", [({}, 0.7), ({"second_time": 0.35}, 0.35)])
def test_two_steps_take_the_files_second_time_not_the_presets(about, second, tmp_path):
    model = load_transformer(GENERATOR).requires_grad_(False)
    save_generator(tmp_path / "apt.safetensors", model, model.config, read_metadata(GENERATOR) | about)
    sampling = load_preset("mini", ["second_time=0.5"], ["sampling"]).sampling
    base, text = (
        ASSETS / "transformer.safetensors",
        torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0)),
    )
    sampler = Sampler(
        Models(base, base, tmp_path / "apt.safetensors"), sampling, "image", text, text[:1], SHAPE, seed=3
    )
    z, fresh = (sample_noise([0, 1], SHAPE, 3, f"sample/{name}") for name in ("z", "z1"))
    torch.testing.assert_close(
        sampler.latents("apt_2"), few_step(model, z, text, (1.0, second), lambda i: fresh), rtol=0, atol=1e-5
    )


def test_any_number_of_steps_is_a_column():
    sampling, text = (
        load_preset("mini").sampling,
        torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0)),
    )
    base, model = ASSETS / "transformer.safetensors", load_transformer(GENERATOR).requires_grad_(False)
    sampler = Sampler(Models(base, base, GENERATOR), sampling, "image", text, text[:1], SHAPE, seed=3)
    z, *fresh = (sample_noise([0, 1], SHAPE, 3, f"sample/z{i or ''}") for i in range(4))
    times = step_times(4, read_metadata(GENERATOR).get("second_time", 0.7))
    torch.testing.assert_close(
        sampler.latents("apt_4"), few_step(model, z, text, times, lambda i: fresh[i - 1]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(sampler.latents("apt_1"), one_step(model, z, text), rtol=0, atol=1e-5)
    columns = (
        "real",
        "real_vae",
        "base_25_cfg1",
        "base_25_cfg",
        "base_25_cfg7.5",
        "base_1",
        "distilled_1",
        "apt_1",
        "apt_2",
        "apt_4",
    )
    assert [network_calls(column, sampling) for column in columns] == [0, 0, 25, 50, 50, 1, 1, 1, 2, 4]
