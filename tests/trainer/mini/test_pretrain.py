"""The commands that rebuild the shipped files, each for an update or two: what they write is what the library
loads.
"""

import numpy as np
import pytest
import torch

from apt_core.errors import AptError
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD
from apt_core.models.vae import decode, encode, load_vae
from trainer.mini import ASSETS, VAE, train_base, train_vae
from trainer.mini.clips import draw
from trainer.mini.features import load_features, train_features
from trainer.mini.metrics import edge_energy
from trainer.mini.pretrain import SHIPPED, pretrain
from trainer.mini.train_text import train_text_encoder
from trainer.stages.muon import Muon

SHIPPED_LIMIT = 24 * 2**20


def quiet(line: str) -> None:
    pass


def test_shipped_files_are_there_and_small():
    sizes = [(ASSETS / name).stat().st_size for name in SHIPPED]
    assert sum(sizes) <= SHIPPED_LIMIT


def test_the_shipped_vae_gives_clips_back():
    vae = load_vae(VAE)
    clips, _ = draw(31, range(8), True)
    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        latents = encode(vae, x)
        y = decode(vae, latents)
    assert latents.shape == (8, 16, 3, 6, 6)
    assert 10 * torch.log10(4 / (x - y).pow(2).mean()) > 28  # dB
    assert latents.mean().abs() < 0.3 and 0.8 < latents.std() < 1.2


@pytest.mark.parametrize("moving", [False, True])
def test_the_shipped_vae_keeps_nine_tenths_of_the_sharpness(moving):
    real, _ = draw(41, range(24), moving)
    x = torch.from_numpy(real).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    vae = load_vae(VAE)
    with torch.no_grad():
        y = decode(vae, encode(vae, x))
    back = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    assert 0.9 < edge_energy(back) / edge_energy(real) < 1.05


def test_the_shipped_base_has_weights_of_normal_size():
    sizes = {
        name: float(p.square().mean().sqrt())
        for name, p in load_transformer(ASSETS / "transformer.safetensors").named_parameters()
        if p.ndim > 1
    }
    blocks = [size for name, size in sizes.items() if name.startswith("blocks.") and name.endswith("weight")]
    # 1 / sqrt(width) is 0.09; without decay it was 0.5 to 1.3
    assert 0.01 < min(blocks) and max(blocks) < 0.1


def test_sharpening_moves_the_decoder_alone(tmp_path):
    settings = dict(updates=2, images=4, clips=2, image_batch=2, clip_batch=1, report=quiet)
    train_vae.sharpen(VAE, tmp_path / "vae.safetensors", **settings)
    before, after = load_vae(VAE).state_dict(), load_vae(tmp_path / "vae.safetensors").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "post_quant_conv"}


def test_a_base_that_is_its_own_teacher_has_nothing_to_learn(tmp_path):
    """The target is the teacher's velocity, and nothing of data or noise is left in it."""
    stages = (train_base.Stage(1, 0.0, 1e-9, 1e-9),)
    settings = dict(stages=stages, image_batch=2, images=4, videos=4, judge_count=2, seed=0)
    lines = []
    first = train_base.train_base(
        tmp_path / "a.safetensors",
        VAE,
        ASSETS / "text_encoder.safetensors",
        work=tmp_path / "a",
        report=quiet,
        **settings,
    )
    state = torch.load(tmp_path / "a" / "state.pt")
    assert float(state["loss"]["image"]) > 0.3
    train_base.train_base(
        tmp_path / "b.safetensors",
        VAE,
        ASSETS / "text_encoder.safetensors",
        work=tmp_path / "b",
        teacher=tmp_path / "a.safetensors",
        report=lines.append,
        **settings,
    )
    assert float(torch.load(tmp_path / "b" / "state.pt")["loss"]["image"]) < 1e-6 and first is not None
    assert any("kernels of 0.0" in line for line in lines)


def test_vae_training_starts_as_an_image_network_per_frame_and_folds_its_statistics(tmp_path):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    fresh = AutoencoderKLWan(base_dim=4).eval().double()
    train_vae.inflate(fresh)
    frame = torch.randn(1, 3, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        still = fresh.decode(fresh.encode(frame.repeat(1, 1, 5, 1, 1)).latent_dist.mean).sample
        alone = fresh.decode(fresh.encode(frame).latent_dist.mean).sample
    assert torch.allclose(still, alone.expand_as(still), rtol=0, atol=1e-10)

    stages = (train_vae.Stage(1, 2, 16, 1, 1e-2, 1e-2), train_vae.Stage(1, 1, 16, 5, 1e-2, 1e-3))
    train_vae.train_vae(tmp_path / "vae.safetensors", stages=stages, pool_size=4, report=quiet)
    vae = load_vae(tmp_path / "vae.safetensors")
    mean, std = train_vae.latent_statistics(vae, draw(1000, range(4), True)[0], "cpu")
    assert np.allclose(mean, LATENTS_MEAN["2.1"], atol=2e-3) and np.allclose(
        std, LATENTS_STD["2.1"], rtol=2e-3
    )


def test_text_and_features_write_what_the_library_loads(tmp_path):
    train_text_encoder(tmp_path / "text.safetensors", updates=2, batch=4, report=quiet)
    text = load_text_encoder(tmp_path / "text.safetensors")
    assert text.text_length == 32 and text.encode(["a red circle"])[0].shape[1] == 96
    train_features(tmp_path / "features.safetensors", updates=2, batch=4, report=quiet)
    assert load_features(tmp_path / "features.safetensors")(torch.zeros(1, 3, 48, 48))[1].shape == (
        1,
        32,
        6,
        6,
    )


def test_base_training_resumes_where_it_stopped(tmp_path):
    vae, text = VAE, ASSETS / "text_encoder.safetensors"
    stages = (train_base.Stage(2, 0.0, 0.02, 0.02), train_base.Stage(2, 1.0, 0.02, 0.01))
    settings = dict(
        stages=stages, image_batch=2, video_batch=2, images=4, videos=4, report=quiet, judge_count=2
    )
    whole = train_base.train_base(tmp_path / "whole.safetensors", vae, text, work=tmp_path / "a", **settings)
    train_base.train_base(
        tmp_path / "half.safetensors", vae, text, work=tmp_path / "b", **settings | {"stages": stages[:1]}
    )
    resumed = train_base.train_base(
        tmp_path / "resumed.safetensors", vae, text, work=tmp_path / "b", **settings
    )
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert load_transformer(tmp_path / "resumed.safetensors").config.num_layers == 6


def test_muon_moves_every_parameter_and_resumes():
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 5))
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    x, optimizers = torch.randn(3, 4, 4, 4), [Muon(net.parameters()) for net in nets]

    def step(net, optimizer):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = [p.clone() for p in nets[0].parameters()]
    for net, optimizer in zip(nets, optimizers):
        step(net, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, nets[0].parameters()))
    fresh = Muon(nets[1].parameters())
    fresh.load_state_dict(optimizers[1].state_dict())
    step(nets[0], optimizers[0])
    step(nets[1], fresh)
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shapes", [[(16, 8), (8, 16)], [(3, 8), (8, 3)]])
def test_muon_takes_adapters_which_have_no_gains_and_of_rank_3_no_kernels(shapes):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer, before = Muon(parameters), [p.detach().clone() for p in parameters]
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    assert all((a - p).abs().max() > 1e-4 for a, p in zip(before, parameters))
    assert len(optimizer.kernels) + len(optimizer.others) == 2 and 2 in (
        len(optimizer.kernels),
        len(optimizer.others),
    )


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(
        AptError, match="no part 'nope' to train; use all, vae, sharpen, text, features, teacher, base"
    ):
        pretrain("nope", tmp_path, seed=0, device="cpu", amp=False, compiled=False)


def test_a_base_training_stopped_while_it_saves_its_latents_can_go_on(tmp_path, monkeypatch):
    vae, text = VAE, ASSETS / "text_encoder.safetensors"
    settings = dict(
        stages=(train_base.Stage(1, 0.0, 0.02, 0.02),),
        image_batch=2,
        images=2,
        videos=2,
        report=quiet,
        judge_count=2,
    )

    def stopped(value, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_base.torch, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_base.train_base(tmp_path / "b.safetensors", vae, text, work=tmp_path / "work", **settings)
    assert not list((tmp_path / "work").iterdir())
    train_base.train_base(tmp_path / "b.safetensors", vae, text, work=tmp_path / "work", **settings)
    assert (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_place_that_is_a_file_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(AptError, match="is a file: give another folder"):
        pretrain("text", tmp_path / place, seed=0, device="cpu", amp=False, compiled=False)
