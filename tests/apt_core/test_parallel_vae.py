"""The decoder on rows of two and four processes against one process."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from failing import Failing
from ranks import start
from vae_configs import SMALL_22

from apt_core.engine.decoder import Decoder
from apt_core.errors import AptError, OutOfMemory

VERSIONS = {
    "2.1": {"base_dim": 4},
    "2.2": SMALL_22,
}
HEIGHTS = (8, 6, 4)
"""Of latents: even on four processes; uneven; one row each."""


def build(version: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    # a difference is then a mistake, not rounding
    vae = AutoencoderKLWan(**VERSIONS[version]).eval().requires_grad_(False).double()
    for name, p in vae.named_parameters():
        if name.endswith(("bias", "gamma")):
            p.add_(torch.randn_like(p) * 0.1)  # an unlike border, and attention that matters
    return vae


def latents(version: str, height: int, frames: int = 3) -> torch.Tensor:
    z = 48 if version == "2.2" else 16
    return torch.randn(1, z, frames, height, 5, generator=torch.Generator().manual_seed(height))


def decode_all(group, folder) -> None:
    results = {}
    for version in VERSIONS:
        decoder = Decoder(build(version), frames_per_call=2, group=group)
        results |= {(version, height): decoder.decode(latents(version, height)) for height in HEIGHTS}
        # Not every process has the same memory; all take the plan of the one with the least.
        least = Decoder(build(version), budget=1 << (10 if group.rank() == 1 else 40), group=group)
        results[version, "slices"] = [part.shape[1] for part in least.stream(latents(version, 8))]
        with pytest.raises(
            AptError,
            match=r"^\d processes cannot share 1 rows of latents: decode with at most 1 processes\.$",
        ):
            decoder.decode(latents(version, 1))
    torch.save(results, folder / f"{group.rank()}.pt")


def fail_everywhere(group, folder) -> None:
    """On the last process each layer in turn is out of memory: in the first call after it exchanged
    something, or in the second before.
    """
    results, vae, z = {}, build("2.2"), latents("2.2", 6)[..., :2]
    for part in (0, 1):
        for index in range(len(Decoder(vae).layers[part])):
            decoder, late = Decoder(vae, frames_per_call=2, group=group), index % 2 == 0
            if group.rank() == group.size() - 1:
                layers = decoder.layers[part]
                layers[index] = Failing(layers[index], calls=(1 if late else 2,), late=late)
            results[part, index] = decoder.decode(z), decoder.steps_taken
    hopeless = Decoder(vae, group=group)
    hopeless.layers[1][0] = Failing(hopeless.layers[1][0], calls=range(100) if group.rank() == 0 else ())
    with pytest.raises(
        OutOfMemory,
        match="out of memory even with 1 latent frame per call, what it remembers on the CPU: free memory",
    ):
        hopeless.decode(z)
    torch.save(results, folder / f"{group.rank()}.pt")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    start(request.param, decode_all, folder, preload=("apt_core.engine.decoder",))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_equals_one_process(version, height, found):
    expected = Decoder(build(version)).decode(latents(version, height))
    assert expected.shape[1] == 9 and 0.05 < expected.std() and (expected.abs() == 1).float().mean() < 0.2
    for results in found:
        torch.testing.assert_close(results[version, height], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_take_the_plan_of_the_least_memory(version, found):
    assert [results[version, "slices"] for results in found] == [[1, 4, 4]] * len(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_part_of_the_seam_matters(version):
    """A row decodes differently without its neighbours' rows, and the frame's attention is felt: the equality
    above is no accident.
    """
    vae, z = build(version), latents(version, 8)
    whole = Decoder(vae).decode(z)
    half = Decoder(vae).decode(z[..., :4, :])
    rows = whole.shape[2] // 2
    assert (whole[:, :, :rows] - half)[:, :, -1].abs().max() > 1e-2
    deaf = copy.deepcopy(vae)
    deaf.decoder.mid_block.attentions[0].proj.weight.zero_()
    assert (Decoder(deaf).decode(z) - whole).abs().max() > 1e-3


def test_out_of_memory_on_one_process_makes_all_step_down(tmp_path):
    start(3, fail_everywhere, tmp_path, preload=("apt_core.engine.decoder",))
    expected = Decoder(build("2.2")).decode(latents("2.2", 6)[..., :2])
    for rank in range(3):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) > 15
        for pixels, steps_taken in results.values():
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
            assert steps_taken == [
                "The VAE decode was out of memory with 2 latent frames per call: "
                "it goes on with 1 latent frame per call."
            ]
