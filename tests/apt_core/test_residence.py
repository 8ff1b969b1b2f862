"""What is on the card at which moment, and that the results stay the same: on a card that is a stand-in, with
real tensors.
"""

import numpy as np
import pytest
import torch
from card import CARD, CPU, Card, on_card
from tiny_models import tiny_mmdit, tiny_wan
from torch import nn

from apt_core.engine.fast import Speed, make_fast
from apt_core.engine.fp8 import Fp8Linear
from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.residence import ALL, BLOCKS, PARTS, BlockStream, Residence, blocks_of
from apt_core.errors import OutOfMemory
from apt_core.models.wan import predict_velocity

PROMPTS = ["a red circle moving left on a green background", "a blue square"]
SIZE = {"height": 48, "width": 48, "frames": 5, "fps": 8}
MEMORY = {ALL: None, PARTS: 0.015, BLOCKS: 1e-4}


@pytest.fixture
def card(monkeypatch):
    with Card(monkeypatch) as card:
        yield card


def wan() -> nn.Module:
    return tiny_wan(num_attention_heads=4, attention_head_dim=16, ffn_dim=96).eval()


def mmdit() -> nn.Module:
    return tiny_mmdit(3, num_attention_heads=4, attention_head_dim=16, axes_dims_rope=(4, 6, 6)).eval()


def velocity(model, device=CPU) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 5, 10, generator=g)
    with torch.no_grad():
        return predict_velocity(model, x.to(device), torch.ones(2).to(device), text.to(device)).cpu()


def places(network) -> set[bool]:
    """Where its tensors are: {True} is all on the card."""
    module = getattr(network, "model", network)
    return {on_card(tensor) for tensor in (*module.parameters(), *module.buffers())}


def pipeline(cache, **options) -> OneStepPipeline:
    return OneStepPipeline.from_checkpoint(
        "mini", dtype=torch.float32, cache=cache, report=lambda _: None, **options
    )


def test_the_stand_in_is_a_card(card):
    x, y = torch.ones(3), torch.ones(3).to(CARD)
    assert (x.device, y.device, (y * 2)[1:].device, y.cpu().device) == (
        CPU,
        CARD,
        CARD,
        CPU,
    ) and card.held() == 12
    with pytest.raises(RuntimeError, match="two devices"):
        x + y
    linear = nn.Linear(2, 2).to(CARD)
    orphan = nn.BatchNorm1d(2)
    orphan.to(CARD)
    buffer = orphan.running_mean
    orphan.to("cpu")
    assert places(linear) == {True} and places(orphan) == {False} and on_card(buffer)


@pytest.mark.parametrize("level", [ALL, PARTS, BLOCKS])
def test_many_samples_and_requests_one_after_another(level, card, tmp_path):
    """Text encoder, then transformer and VAE for each sample, then all of it again: each network comes back
    to the card whole.
    """
    plain = pipeline(tmp_path / "cpu", device="cpu")
    low = pipeline(tmp_path / "card", device=CARD, memory=MEMORY[level])
    for prompts, count in ((PROMPTS, 2), (["a green star"], 1)):
        expected, found = (pipe(prompts, count=count, **SIZE) for pipe in (plain, low))
        for a, b in zip(expected, found, strict=True):
            assert a.prompt == b.prompt and a.frames.shape == b.frames.shape
            assert np.abs(a.frames.astype(int) - b.frames).max() <= 1
    assert low.residence.level == level
    assert all(places(network) == {True} for network in low.residence.networks.values()) or level > ALL


@pytest.mark.parametrize("level", [PARTS, BLOCKS])
def test_only_the_network_in_use_is_on_the_card(level, card, tmp_path, monkeypatch):
    pipe, seen, real = pipeline(tmp_path, device=CARD, memory=MEMORY[level]), [], Residence.run

    def run(self, name, load, work, alone=True):
        def look(network):
            others = [other for key, other in self.networks.items() if key != name]
            assert all(places(other) == {False} for other in others)
            seen.append((name, places(network)))
            return work(network)

        return real(self, name, load, look, alone)

    monkeypatch.setattr(Residence, "run", run)
    for prompt in PROMPTS:
        pipe(prompt, count=2, **SIZE | {"frames": 1})
    some = {True} if level == PARTS else {True, False}
    each = [("transformer", some), ("vae", {True})]
    assert seen == [("text encoder", some), *each, *each] * 2
    network = pipe.residence.networks["transformer"]
    if level == BLOCKS:
        assert all(places(block) == {False} for block in blocks_of(network))


def test_what_a_decoder_made_of_the_weights_leaves_with_them(card, tmp_path):
    """Also when there was room for everything at first, and when a clip was not decoded to its end."""
    pipe = pipeline(tmp_path, device=CARD, memory=MEMORY[PARTS])
    stream = pipe.stream(PROMPTS[0], **SIZE | {"frames": 9})
    next(stream)
    del stream
    assert pipe._decoder is not None
    pipe.latents(pipe.request("a green star", **SIZE), 0, pipe.embed(pipe.request("a green star", **SIZE)))
    transformer = pipe.residence.networks["transformer"]
    assert pipe._decoder is None and card.held() < 1.1 * sum(
        t.numel() * 4 for t in (*transformer.parameters(), *transformer.buffers())
    )


@pytest.mark.parametrize("make", [wan, mmdit])
@pytest.mark.parametrize("speed", [Speed(), Speed(fp8=True)], ids=["plain", "fp8"])
def test_a_stream_after_its_network_was_away(make, speed, card):
    """In fp8 the weights of the blocks are buffers, which `.to` replaces."""
    model = make_fast(make(), CPU, speed)
    expected = velocity(make_fast(make(), CPU, speed).to(CARD), CARD)
    residence, other = Residence(CARD, BLOCKS), nn.Linear(2, 2)
    for _ in range(3):
        assert torch.equal(
            residence.run("a", lambda _: model, lambda network: velocity(network, CARD)), expected
        )
        residence.run("b", lambda _: other, lambda network: None)
        assert places(model) == {False} and card.held() == 24
    assert speed == Speed() or any(isinstance(module, Fp8Linear) for module in model.modules())


def test_a_pass_that_failed_leaves_nothing_on_the_card(card):
    model, expected = wan(), velocity(wan())
    residence = Residence(CARD, BLOCKS)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.blocks[1].attn2.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory, match="runs out of memory even with a single block of a network on it"):
        residence.run("a", lambda _: model, lambda network: velocity(network, CARD))
    assert places(model) == {False} and card.held() == 0
    hook.remove()
    assert torch.equal(residence.run("a", lambda _: model, lambda network: velocity(network, CARD)), expected)


def test_work_that_others_wait_for_is_not_tried_again(card):
    calls = []

    def work(network):
        calls.append(network)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    residence = Residence(CARD)
    with pytest.raises(
        OutOfMemory, match=f"^{CARD} runs out of memory: add processes, or give all of them a smaller memory"
    ):
        residence.run("a", lambda device: nn.Linear(2, 2).to(device), work, alone=False)
    assert len(calls) == 1 and residence.level == ALL and not residence.steps_taken


def test_memory_on_the_card(card):
    """Beside the rest of the network, two blocks at a time."""
    model = wan().requires_grad_(False)
    sizes = [sum(t.numel() * 4 for t in (*block.parameters(), *block.buffers())) for block in model.blocks]
    rest = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers())) - sum(sizes)
    stream = BlockStream(model, CARD)
    stream.begin()
    assert card.held() == rest
    card.peak, most = 0, []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: most.append(sum(places(b) == {True} for b in model.blocks)))
    velocity(model, CARD)
    assert most == [0, 0, 0] and rest + 2 * sizes[0] < card.peak < rest + 3 * sizes[0]
    stream.end()
    assert card.held() == 0


def test_a_tensor_that_a_block_shares_stays_with_the_rest(card):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    model.out = nn.Linear(3, 3)
    model.out.weight = model.blocks[1].weight
    x = torch.randn(2, 3)
    expected = model.out(nn.Sequential(*model.blocks)(x)).detach()
    residence = Residence(CARD, BLOCKS)
    for _ in range(2):
        found = residence.run("a", lambda _: model, lambda m: m.out(nn.Sequential(*m.blocks)(x.to(CARD))))
        assert torch.equal(found.detach().cpu(), expected)
        assert model.out.weight is model.blocks[1].weight and on_card(model.out.weight)


def test_stepping_down_to_blocks_and_on(card):
    """Memory runs out twice in the first pass: the same numbers, and again after another network's turn."""
    model, expected, calls = wan(), velocity(wan()), []

    def work(network):
        calls.append(places(network))
        if len(calls) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return velocity(network, CARD)

    residence = Residence(CARD)
    for _ in range(2):
        assert torch.equal(residence.run("a", lambda device: model.to(device), work), expected)
        residence.run("b", lambda device: nn.Linear(2, 2).to(device), lambda _: None)
    assert (
        calls == [{True}, {True}, {True, False}, {True, False}]
        and residence.level == BLOCKS
        and len(residence.steps_taken) == 2
    )


def test_compiled_blocks_stay_compiled_in_a_stream(monkeypatch):
    """One graph for all blocks, at every level: the moves are not in it."""
    real, graphs, runs = torch.compile, [], []

    def count(graph, inputs):
        graphs.append(graph)
        return lambda *values: runs.append(graph) or graph(*values)

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: real(function, backend=count, fullgraph=True, **options)
    )
    torch._dynamo.reset()
    model, expected = make_fast(wan(), CPU, Speed(compile=True)), velocity(wan())
    residence = Residence(CPU)
    for level in (ALL, PARTS, BLOCKS, BLOCKS):
        residence.level = level
        torch.testing.assert_close(residence.run("a", lambda _: model, velocity), expected, rtol=0, atol=2e-6)
    assert len(graphs) == 1 and len(runs) == 4 * len(model.blocks)
