import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from apt_core.errors import AptError
from apt_core.method.generator import euler_cfg, few_step, guided_velocity, one_step
from apt_core.models.wan import predict_velocity


def inputs(n=2, seed=3, shape=(4, 2, 4, 6), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(n, *shape, generator=g),
        torch.randn(n, 5, 10, generator=g),
        torch.randn(1, 5, 10, generator=g),
    )
    return tuple(value.to(dtype) for value in values)


def stock_velocity(model, x, t, text):
    return model(x, torch.full((len(x),), 1000.0 * t, dtype=x.dtype), text, return_dict=False)[0]


def test_one_step_is_z_minus_v(wan):
    model, (z, text, _) = wan(), inputs()
    assert torch.equal(one_step(model, z, text), z - stock_velocity(model, z, 1.0, text))
    one_step(model, z, text).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_one_step_is_stock_diffusers_bit_for_bit(stock, wan, dtype, shift):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    theirs, ours = stock().to(dtype), wan().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=theirs,
    )
    pipe.set_progress_bar_config(disable=True)
    z, text, _ = inputs(shape=(4, 2, 4, 6))
    frames = pipe(
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=z.clone(),
        prompt_embeds=text,
        output_type="latent",
    ).frames
    with torch.no_grad():
        x = one_step(ours, z, text)
    assert x.dtype == torch.float32
    assert frames.dtype == dtype and torch.equal(x.to(dtype), frames)


def test_few_step(double, wan):
    model, (z, text, _) = wan().double(), inputs(dtype=torch.float64)
    noise = {i: torch.randn(z.shape, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2)}
    with torch.no_grad():
        assert torch.equal(few_step(model, z, text, (1.0,), None), one_step(model, z, text))
        x = z - stock_velocity(model, z, 1.0, text)
        for i, t in ((1, 0.75), (2, 0.25)):
            x_t = (1 - t) * x + t * noise[i]
            x = x_t - t * stock_velocity(model, x_t, t, text)
    got = few_step(model, z, text, (1.0, 0.75, 0.25), noise.__getitem__)
    assert torch.allclose(got, x, rtol=0, atol=1e-12) and not got.requires_grad


@pytest.mark.parametrize(
    "times",
    [(), (0.9,), (1.0, 1.0), (1.0, 0.5, 0.6), (1.0, 0.0), (1.0, -0.5), (1000.0, 500.0), (1.0, float("nan"))],
)
def test_few_step_refuses(wan, times):
    z, text, _ = inputs()
    with pytest.raises(AptError):
        few_step(wan(), z, text, times, lambda i: z)


@pytest.mark.parametrize("scale, shift", [(1.0, 1.0), (7.5, 1.0), (3.0, 5.0)])
def test_euler_cfg_against_a_hand_written_loop(double, wan, scale, shift):
    model, (z, text, negative) = wan().double(), inputs(dtype=torch.float64)
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kw: calls.append(kw["timestep"][0].item()), with_kwargs=True
    )
    got = euler_cfg(model, z, text, negative, 4, scale, shift)
    hook.remove()
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert calls[:: 1 if scale == 1 else 2] == pytest.approx([1000 * s for s in sigmas[:-1]], abs=1e-3)
    assert len(calls) == (4 if scale == 1 else 8)
    x = z
    with torch.no_grad():
        for a, b in zip(sigmas, sigmas[1:]):
            t = torch.tensor(a, dtype=torch.float32).item()  # the network is told its time in fp32
            v = stock_velocity(model, x, t, text)
            v0 = stock_velocity(model, x, t, negative.repeat(2, 1, 1))
            x = x + (b - a) * (v0 + scale * (v - v0))
    assert torch.allclose(got, x, rtol=0, atol=1e-12)


def test_euler_against_the_diffusers_scheduler(wan):
    model, (z, text, negative) = wan(), inputs()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas[-1] == 0
    x = z
    with torch.no_grad():
        for t in scheduler.timesteps:
            v0 = model(x, t.expand(2), negative.expand(2, -1, -1), return_dict=False)[0]
            v = model(x, t.expand(2), text, return_dict=False)[0]
            x = scheduler.step(v0 + 4.0 * (v - v0), t, x, return_dict=False)[0]
    assert torch.allclose(euler_cfg(model, z, text, negative, 4, 4.0, 5.0), x, atol=1e-5)


def test_one_euler_step_is_the_one_step_generator(wan):
    model, (z, text, _) = wan(), inputs()
    assert torch.equal(euler_cfg(model, z, text, None, 1, 1.0, 12.0), one_step(model, z, text).detach())


def test_guidance(double, wan):
    model, (z, text, negative) = wan().double(), inputs(dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    with torch.no_grad():
        v, v0 = predict_velocity(model, z, t, text), predict_velocity(model, z, t, negative.repeat(2, 1, 1))
        assert torch.allclose(
            guided_velocity(model, z, t, text, negative, 7.5), v0 + 7.5 * (v - v0), rtol=0, atol=1e-12
        )
        assert torch.equal(guided_velocity(model, z, t, text, None, 1), v)
    with pytest.raises(AptError, match="negative"):
        guided_velocity(model, z, t, text, None, 7.5)
    with pytest.raises(AptError):
        euler_cfg(model, z, text, negative, 0, 1.0, 1.0)
