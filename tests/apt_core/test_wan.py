import pytest
import torch
from diffusers import WanTransformer3DModel

from apt_core.errors import AptError
from apt_core.models.wan import WanBackbone, predict_velocity, tap_blocks


def inputs(n=2):
    g = torch.Generator().manual_seed(5)
    return (
        torch.randn(n, 4, 2, 4, 6, generator=g),
        torch.tensor([1000.0, 701.0])[:n],
        torch.randn(n, 5, 10, generator=g),
    )


@pytest.mark.parametrize(
    "layers, blocks",
    [(36, (16, 26, 36)), (30, (13, 22, 30)), (40, (18, 29, 40)), (6, (3, 4, 6)), (3, (1, 2, 3))],
)
def test_tap_blocks(layers, blocks):
    assert tap_blocks(layers) == blocks


@pytest.mark.parametrize(
    "layers, fractions",
    [
        (2, (4 / 9, 13 / 18, 1)),
        (1, (0.4, 1)),
        (10, (0.5, 0.5)),
        (10, (0.9, 0.5)),
        (10, (0, 1)),
        (10, (0.5, 1.1)),
        (10, ()),
    ],
)
def test_tap_blocks_refuses(layers, fractions):
    with pytest.raises(AptError):
        tap_blocks(layers, fractions)


def close(found, expected):
    """In fp64: two programs of one formula may round differently."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_taps_it_is_the_stock_forward(double, wan, stock):
    x, t, text = (value.double() for value in inputs())
    ours, theirs = wan().double(), stock().double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = theirs(x, t, text).sample
    close(ours(x, t, text).sample, expected)
    close(ours(x, t, text, return_dict=False)[0], expected)


def grads(model):
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("taps", [(1, 2, 4), (2,), (4,)])
def test_taps_are_the_stock_blocks_outputs(double, wan, stock, checkpointing, taps):
    x, t, text = (value.double() for value in inputs())
    ours, theirs = wan(layers=4).double(), stock(layers=4).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    seen = {}
    for i, block in enumerate(theirs.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out))
    theirs(x, t, text)
    calls = [0] * 4
    for i, block in enumerate(ours.blocks):
        block.register_forward_pre_hook(lambda _m, _i, i=i: calls.__setitem__(i, calls[i] + 1))
    if checkpointing:
        ours.enable_gradient_checkpointing()
    features = ours(x, t, text, taps=taps)
    assert calls == [1] * taps[-1] + [0] * (4 - taps[-1])  # stops after the last tap
    assert [f.shape for f in features] == [(2, 2 * 2 * 3, 24)] * len(taps)
    for tap, feature in zip(taps, features):
        close(feature, seen[tap])

    sum((f * torch.arange(24)).sum() for f in features).backward()
    sum((seen[tap] * torch.arange(24)).sum() for tap in taps).backward()
    expected, got = grads(theirs), grads(ours)
    assert expected.keys() == got.keys() and expected
    for name in expected:
        close(got[name], expected[name])
    if checkpointing:
        assert sum(calls) > taps[-1]  # blocks ran again in the backward pass


@pytest.mark.parametrize("taps", [(), (0, 1), (2, 1), (1, 1), (1, 4)])
def test_bad_taps(wan, taps):
    with pytest.raises(AptError):
        wan()(*inputs(), taps=taps)


def test_dropped_head(wan):
    model = wan()
    x, t, text = inputs()
    before = model(x, t, text, taps=(1, 3))
    model.drop_output_head()
    names = set(model.state_dict())
    assert not any(n.startswith(("proj_out", "norm_out")) or n == "scale_shift_table" for n in names)
    assert "blocks.0.scale_shift_table" in names
    for a, b in zip(before, model(x, t, text, taps=(1, 3))):
        assert torch.equal(a, b)
    with pytest.raises(AptError, match="taps"):
        model(x, t, text)


def test_keep_blocks(wan):
    model = wan(layers=4)
    model.keep_blocks(2)
    assert len(model.blocks) == 2 and model.config.num_layers == 2


def test_network_is_fed_1000_t_in_fp32():
    seen = {}

    def model(hidden_states, timestep, encoder_hidden_states, return_dict):
        seen.update(timestep=timestep)
        return (hidden_states.bfloat16(),)

    out = predict_velocity(model, torch.ones(2, 1), torch.tensor([0.701, 1.0]), torch.zeros(2, 1, 1))
    assert out.dtype == torch.float32
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].tolist() == pytest.approx([701.0, 1000.0], abs=1e-4)
    predict_velocity(model, torch.ones(1, 1), torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    assert seen["timestep"].dtype == torch.float32 and seen["timestep"].item() == 1000
    with pytest.raises(AptError):
        predict_velocity(model, torch.ones(2, 1), torch.ones(1), torch.zeros(2, 1, 1))


def test_fp32_time_survives_a_bf16_model(wan):
    model = wan().to(torch.bfloat16)
    seen = []
    model.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x, _, text = inputs()
    with torch.no_grad():
        v = predict_velocity(model, x, torch.tensor([0.701, 0.5]), text)
        model(x, torch.tensor([701.0, 500.0]), text, taps=(1,))
    assert v.dtype == torch.float32
    for timestep in seen:
        assert timestep.dtype == torch.float32 and timestep.tolist() == pytest.approx(
            [701.0, 500.0], abs=1e-3
        )


def test_a_stock_folder_loads(same, stock, tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    loaded = WanBackbone.from_pretrained(tmp_path)
    assert isinstance(loaded, WanTransformer3DModel)
    x, t, text = (value.double() for value in inputs())
    same(loaded, model, lambda model: model(x, t, text).sample)
