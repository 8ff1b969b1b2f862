"""A look inside: probes, walks and the discriminator's attention, by value, on networks that are known and on
the miniature.
"""

import json
import math

import av
import numpy as np
import pytest
import torch
from tiny_models import tiny_wan
from torch import nn

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.method.discriminator import Discriminator
from apt_core.method.flow import shift
from apt_core.models.patches import to_patches
from apt_core.models.wan import WanBackbone
from trainer.inside.attention import TIMES, Seen, find_state, look
from trainer.inside.opening import find_captions
from trainer.inside.probe import fit, judge, read, run_probe
from trainer.inside.walk import read_seeds, run_walk
from trainer.run.folders import resolve

PROMPT = "a red circle moving left on a green background"
SHAPE = (4, 2, 8, 8)
TEXT = torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return OneStepPipeline.from_checkpoint("mini", device="cpu", cache=tmp_path_factory.mktemp("cache"))


def tiny(layers: int = 3) -> WanBackbone:
    return tiny_wan(layers=layers).eval().requires_grad_(False)


def sample(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(number)), TEXT


class Known(nn.Module):
    """A generator whose block 2 holds the result, mixed with something else and by a known linear map; block
    1 holds its mean over each frame and channel, block 3 nothing.
    """

    class config:
        num_layers, patch_size = 3, (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.mixing = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3))).Q

    def result(self, z):
        return torch.roll(z, 1, dims=4) ** 3 - 0.5 * z

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True, taps=None):
        x = self.result(hidden_states)
        if taps is None:
            return (hidden_states - x,)
        assert tuple(taps) == (1, 2, 3) and timestep.tolist() == [1000.0]
        g = torch.Generator().manual_seed(int(hidden_states.abs().sum() * 1000))
        other = torch.randn(1, 32, 8, generator=g)
        layout = to_patches(x.mean((3, 4), keepdim=True).expand_as(x), (1, 2, 2))
        return [
            layout,
            torch.cat([to_patches(x, (1, 2, 2)), other], dim=2) @ self.mixing + 5,
            torch.randn(1, 32, 24, generator=g),
        ]


def test_a_block_that_holds_the_result_has_error_zero_and_one_that_holds_nothing_has_one():
    model = Known()
    probes = fit(model, sample, range(40), 1e-9)
    error = judge(model, probes, sample, range(40, 60), cut=0.1)
    assert all(errors[2] < 1e-11 for errors in error.values())  # fp32 tokens around 5: (4e-7)^2
    assert all(0.95 < errors[3] < 1.3 for errors in error.values())
    # The mean of each frame is the lowest frequency: nothing is left of it, and all of the others.
    assert error["low"][1] < 1e-10 and 0.98 < error["high"][1] < 1.1
    x, guesses = read(model, probes, *sample(70))
    torch.testing.assert_close(x, model.result(sample(70)[0]))
    torch.testing.assert_close(guesses[2], x, rtol=0, atol=1e-4)


def test_the_error_is_relative_to_the_variance_at_each_place():
    model = Known()
    zero = [
        (torch.zeros(width, 16, dtype=torch.float64), torch.full((16,), 0.25, dtype=torch.float64))
        for width in (16, 16, 24, 24)
    ]
    error = judge(model, zero, sample, range(8), cut=1 / 3)
    x = torch.cat([model.result(sample(number)[0]) for number in range(8)]).double()
    expected = (x - 0.25).square().sum() / (x - x.mean(0)).square().sum()
    assert error["all"] == pytest.approx([expected.item()] * 4, rel=1e-9)


def test_the_miniatures_probe_in_small(pipe, tmp_path):
    result = run_probe(pipe, tmp_path, samples=40, held_out=6, frames=1)
    assert result == json.loads((tmp_path / "probe.json").read_text())
    error = result["error"]["low"]
    # the last block knows the sample, the first one does not
    assert len(error) == 7 and error[6] < 0.7 * error[1]
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_walk_passes_through_the_samples_of_its_seeds(pipe, tmp_path):
    paths = run_walk(pipe, PROMPT, [7, 3], 4, tmp_path, frames=1)
    facts = json.loads(paths[2].read_text())
    assert facts["samples"] == 5 and len(facts["change"]) == 4
    first, last = (pipe(PROMPT, seed=seed, frames=1).frames for seed in (7, 3))
    assert facts["change_of_a_leg"] == [round(float(np.abs(first.astype(int) - last).mean()), 4)]
    rms = facts["noise_rms"]
    assert rms == pytest.approx(np.linspace(rms[0], rms[4], 5), abs=2e-6)
    with av.open(str(paths[0])) as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(shown) == 8  # there and back, for a loop without a seam
    for frame, exact in ((shown[0], first[0]), (shown[4], last[0])):
        assert np.abs(frame[::5, ::5].astype(int) - exact).mean() < 8  # through H.264
    assert [step["after_sample"] for step in facts["largest"]] == [int(np.argmax(facts["change"]))]


def test_the_ends_of_a_walk_are_those_samples_bit_for_bit(pipe, tmp_path, monkeypatch):
    seen = []
    original = pipe.latents
    monkeypatch.setattr(pipe, "latents", lambda *given: seen.append(original(*given)) or seen[-1])
    run_walk(pipe, PROMPT, [7, 3], 2, tmp_path, frames=1, closed=True)
    assert len(seen) == 4
    for latent, seed in ((seen[0], 7), (seen[2], 3)):
        request = pipe.request(PROMPT, seed=seed, frames=1)
        assert torch.equal(latent, original(request, 0, pipe.embed(request)))
    torch.testing.assert_close(seen[1], seen[3], rtol=0, atol=1e-4)  # halfway there and halfway back


def test_seeds_that_are_no_walk(pipe, tmp_path):
    assert read_seeds(" 1, 2,18446744073709551615") == [1, 2, 2**64 - 1]
    for text in ("1", "1,,2", "1,-2", "a,b", f"1,{2**64}"):
        with pytest.raises(AptError, match="whole numbers from 0 with commas"):
            read_seeds(text)
    for seeds, closed in (([1, 1], False), ([1, 2, 1], True)):
        with pytest.raises(AptError, match="neighbours different"):
            run_walk(pipe, PROMPT, seeds, 3, tmp_path, closed=closed)


def test_captions_are_the_given_ones_or_the_miniatures(pipe):
    assert find_captions(pipe, 5, True, ["a", "b"]) == ["a", "b", "a", "b", "a"]
    assert all(" moving " in caption for caption in find_captions(pipe, 9, True))
    assert not any(" moving " in caption for caption in find_captions(pipe, 9, False))


def test_mini_is_the_shipped_generator_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(type(tmp_path)("mini")).name == "apt_mini.safetensors"
    (tmp_path / "mini").mkdir()
    assert resolve(type(tmp_path)("mini")) == type(tmp_path)("mini")


def test_where_the_discriminator_looks_is_the_mean_over_its_times():
    torch.manual_seed(1)
    d = Discriminator(tiny()).eval()
    x, _ = sample(0)
    weights, logit = look(d, x, TEXT, 12.0)
    t = [shift((i + 0.5) / TIMES, 12.0) for i in range(TIMES)]
    with torch.no_grad():
        logits = torch.stack([d(x, torch.tensor([time]), TEXT) for time in t])
        each = [d.weights(x, torch.tensor([time]), TEXT) for time in t]
    assert logit == pytest.approx(logits.mean().item(), rel=1e-5)
    for depth in range(3):
        assert weights[depth].shape == (2, 2, 4, 4)
        torch.testing.assert_close(weights[depth].sum((1, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            weights[depth].flatten(1),
            torch.stack([found[depth][0] for found in each]).mean(0),
            rtol=1e-4,
            atol=1e-6,
        )


def test_maps_are_multiples_of_an_even_look():
    even = torch.full((2, 3, 2, 2), 1 / 12)
    one = torch.zeros(2, 3, 2, 2)
    one[:, 1, 0, 1] = 1  # all on one patch of the frame in the middle
    seen = Seen("real", "", np.zeros((4, 4, 3), np.uint8), [even, one], 0.0)
    assert seen.map(0) == pytest.approx(np.ones((2, 2))) and seen.by_frame(0) == pytest.approx([1 / 3] * 3)
    assert seen.map(1, 1).tolist() == [[0, 12], [0, 0]] and seen.by_frame(1).tolist() == [0, 1, 0]
    assert seen.spread(0) == pytest.approx([1, 1]) and seen.spread(1) == pytest.approx([math.exp(0) / 12] * 2)


def test_a_folder_without_states_is_named(tmp_path):
    with pytest.raises(AptError, match="holds no training state of stage 2"):
        find_state(tmp_path)
    with pytest.raises(AptError, match="--phase both is not known"):
        find_state(tmp_path, "both")
