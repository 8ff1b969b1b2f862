import math

import pytest
import torch

from apt_core.errors import AptError
from apt_core.method.discriminator import CrossAttentionHead, Discriminator


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_head(p, tokens, heads):
    """Fig. 1 by hand: `p` is the head's state dict, tokens [B, S, d]."""
    token = p["token"].expand(len(tokens), 1, -1)
    kv = rms(tokens, p["norm_visual.weight"])
    q = rms(token, p["norm_token.weight"]) @ p["to_q.weight"].T + p["to_q.bias"]
    k = kv @ p["to_k.weight"].T + p["to_k.bias"]
    v = kv @ p["to_v.weight"].T + p["to_v.bias"]
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    q, k = rms(q, p["norm_q.weight"]), rms(k, p["norm_k.weight"])
    weights = (torch.einsum("bqhc,bshc->bhqs", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    answer = torch.einsum("bhqs,bshc->bqhc", weights, v).flatten(2)
    token = token + answer @ p["to_out.weight"].T + p["to_out.bias"]
    h = rms(token, p["norm_mlp.weight"]) @ p["mlp.0.weight"].T + p["mlp.0.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return (token + h @ p["mlp.2.weight"].T + p["mlp.2.bias"])[:, 0]


@pytest.mark.parametrize("dim, heads, inner", [(24, 2, None), (24, 4, 8), (20, 1, 40)])
def test_head_against_a_hand_written_reference(dim, heads, inner):
    torch.manual_seed(0)
    head = CrossAttentionHead(dim, heads, inner).double()
    with torch.no_grad():
        for p in head.parameters():  # norms at 1 and biases at 0 would hide mistakes
            p.add_(0.3 * torch.randn_like(p))
    tokens = torch.randn(3, 7, dim, dtype=torch.float64)
    assert head.to_k.weight.shape == (inner or dim, dim)
    assert torch.allclose(head(tokens), reference_head(head.state_dict(), tokens, heads), atol=1e-10)


@pytest.mark.parametrize("dim, heads, inner", [(24, 2, None), (24, 4, 8)])
def test_weights_sum_to_one_and_give_the_heads_own_output(dim, heads, inner):
    torch.manual_seed(0)
    head = CrossAttentionHead(dim, heads, inner).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    tokens = 3 * torch.randn(3, 7, dim, dtype=torch.float64)
    weights = head.weights(tokens)
    assert weights.shape == (3, heads, 7) and weights.dtype == torch.float32 and weights.std() > 0.02
    torch.testing.assert_close(weights.sum(2), torch.ones(3, heads), rtol=0, atol=1e-6)
    # The values by hand, weighed, through the rest of the head.
    p = head.state_dict()
    values = (rms(tokens, p["norm_visual.weight"]) @ p["to_v.weight"].T + p["to_v.bias"]).unflatten(
        2, (heads, -1)
    )
    answer = torch.einsum("bhs,bshc->bhc", weights.double(), values).flatten(1)
    token = p["token"][0] + answer @ p["to_out.weight"].T + p["to_out.bias"]
    torch.testing.assert_close(token + head.mlp(head.norm_mlp(token)), head(tokens), rtol=0, atol=1e-5)


def test_a_head_in_pieces_is_not_asked():
    head = CrossAttentionHead(24, 2)
    head.split = object()
    with pytest.raises(AptError, match="on one process"):
        head.weights(torch.randn(1, 7, 24))


def test_the_discriminator_asks_each_head_at_its_depth(disc, batch):
    d = disc(layers=6)
    x, _, text, t, *_ = batch()
    found = d.weights(x, t, text)
    features = d.backbone(x, 1000 * t, text, taps=d.taps)
    assert [tuple(depth.shape) for depth in found] == [(2, 2, 12)] * 3
    assert all(torch.equal(depth, head.weights(f)) for depth, head, f in zip(found, d.heads, features))


def test_head_token_and_bad_sizes():
    torch.manual_seed(0)
    assert CrossAttentionHead(4096, 1, 8).token.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(AptError):
        CrossAttentionHead(24, 5)


def test_logits_against_the_parts(double, disc, batch):
    d = disc(layers=6).double()
    with torch.no_grad():
        d.norm.weight.add_(0.2 * torch.randn_like(d.norm.weight))
    x, _, text, t, *_ = (value.double() for value in batch())
    assert d.taps == (3, 4, 6)
    features = d.backbone(x, 1000 * t, text, taps=(3, 4, 6))
    joined = torch.cat([reference_head(h.state_dict(), f, 2) for h, f in zip(d.heads, features)], dim=1)
    joined = (joined - joined.mean(1, keepdim=True)) / (
        joined.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    expected = (joined * d.norm.weight + d.norm.bias) @ d.logit.weight[0] + d.logit.bias
    logits = d(x, t, text)
    assert logits.shape == (2,)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "kw",
    [{}, {"layers": 6, "fractions": (1 / 3, 2 / 3)}, {"fractions": (1,)}, {"num_heads": 4, "inner_dim": 8}],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_has_a_gradient(disc, batch, kw, checkpointing):
    d = disc(**kw)
    if checkpointing:
        d.enable_gradient_checkpointing()
    x, _, text, t, *_ = batch()
    d(x, t, text).sum().backward()
    idle = [n for n, p in d.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_checkpointing_changes_nothing(disc, batch):
    x, _, text, t, *_ = batch()
    results = []
    for checkpointing in (False, True):
        d = disc()
        if checkpointing:
            d.enable_gradient_checkpointing()
        logits = d(x, t, text)
        logits.sum().backward()
        results.append([logits.detach()] + [p.grad for p in d.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_logit_depends_on_every_input(disc, batch):
    d = disc()
    x, other, text, t, *_ = batch()
    with torch.no_grad():
        base = d(x, t, text)
        for changed in (d(other, t, text), d(x, 1 - t, text), d(x, t, text.flip(0))):
            assert ((base - changed).abs() > 1e-4).all()
        # One t per sample: changing one sample's time leaves the other's logit alone.
        mixed = d(x, torch.stack([t[0], 1 - t[1]]), text)
        assert torch.allclose(mixed[0], base[0], atol=1e-6) and (mixed[1] - base[1]).abs() > 1e-4


def test_bf16_weights_give_fp32_logits(disc, batch):
    d = disc()
    x, _, text, t, *_ = batch(8)
    with torch.no_grad():
        exact = d(x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = d(x, t, text)
        half = d.to(torch.bfloat16)(x, t, text)
    for logits in (mixed, half):
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, exact, atol=0.05)
        assert not torch.equal(logits, logits.bfloat16().float())  # not a bf16 number in disguise


def test_no_unused_parameters_are_left(disc):
    full = set(disc(layers=6).state_dict())
    assert not any("proj_out" in n or n == "backbone.scale_shift_table" for n in full)
    half = disc(layers=6, fractions=(0.25, 0.5))
    assert len(half.backbone.blocks) == 3 == half.backbone.config.num_layers


def test_image_conditioned_backbones_are_refused(wan):
    backbone = wan()
    backbone.register_to_config(image_dim=8)
    with pytest.raises(AptError, match="image"):
        Discriminator(backbone)
