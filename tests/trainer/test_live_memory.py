"""The account's bytes against those of real updates: all that torch holds while the trainer's own functions,
FSDP2 among them, take an update of two microbatches of a small model.

The two may differ by 10%. The account leaves out what does not grow with a model's depth: latents, noise and
text embeddings, rotary tables, and what single operations return on the way. No figure is of a card: RMSNorm
is one operation here, as on CUDA, where a CPU would take ten.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import save_file
from torch import Tensor

from apt_core.method import optim
from apt_core.models.lora_files import official_shapes
from trainer.bench.shapes import build_backbone
from trainer.bench.train import RandomBatches
from trainer.config import load_preset
from trainer.jobs.starts import open_start
from trainer.machines.account import account
from trainer.machines.distributed import connect
from trainer.machines.parallel import parallel_of
from trainer.stages import adversarial as stage_2
from trainer.stages import distill as consistency
from trainer.stages import dmd
from trainer.stages.networks import Lora
from trainer.stages.setup import Setup

SMALL = (
    "model.layers=4",
    "model.heads=4",
    "model.head_dim=32",
    "model.ffn=746",  # as many widths as in Wan 2.1 1.3B
    "model.text_dim=128",
    "model.text_length=16",
    "height=256",
    "width=256",
    "image_height=96",
    "image_width=96",
    "frames=9",
    "lora_rank=8",
)


@torch.library.custom_op("apt_live::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * inverse * weight.float()).to(x.dtype), inverse


@torch.library.custom_op("apt_live::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    normed, to_normed = x.float() * inverse, gradient.float() * weight.float()
    to_x = inverse * (to_normed - normed * (to_normed * normed).mean(-1, keepdim=True))
    return to_x.to(x.dtype), (gradient.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


rms_norm.register_autograd(
    lambda ctx, gradient, _: (*rms_norm_backward(gradient.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1]),
)


class Done(Exception):
    pass


class Batches(RandomBatches):
    """Of one kind of sample, for either stage."""

    def __init__(self, preset, kind):
        super().__init__(preset, kind)
        self.kind = kind

    def take(self, kind, stream, update, size, world, microbatch=None, following=None):
        return super().take(kind, stream, update, size, world, microbatch)

    def available(self, kind):
        return self.kind

    def embed(self, prompts):
        return self.text.expand(len(prompts), *self.text.shape)


def live_update(preset, module, networks, batches, train, monkeypatch) -> int:
    """The most bytes during one update, once the networks are built by this function of the module.
    train: runs the stage on these batches, given its setup.
    """
    live, build = LiveBytes(), getattr(module, networks)

    def built(*args, **kwargs):
        made = build(*args, **kwargs)
        live.peak = live.most = live.now
        return made

    def load(path, dtype=torch.float32, device="cpu"):
        return build_backbone(preset.model, device, dtype).requires_grad_(True)

    def report(*update):
        raise Done

    monkeypatch.setattr(module, networks, built)
    monkeypatch.setattr(
        torch.nn.functional,
        "rms_norm",
        lambda x, shape, weight, eps: rms_norm(x.contiguous(), weight, eps)[0],
    )
    monkeypatch.setattr(optim, "FOREACH_BYTES", 0)  # as a model of true size is stepped
    with connect("cpu", sharded=True) as world, live, pytest.raises(Done):
        train(
            Setup(
                batches=batches,
                out=Path("out"),
                seed=0,
                metadata={},
                report=report,
                world=world,
                parallel=parallel_of(preset, "cpu")[0],
                lora=Lora(preset.train.lora_rank) if preset.train.mode == "lora" else None,
                ema_decays=preset.train.ema_decays,
                load=load,
            )
        )
    return live.peak


def measured(preset, phase, monkeypatch, start=Path("base")) -> int:
    """The most bytes during one update of stage 2."""
    settings = getattr(preset.phases(preset.default_recipe), phase)
    batches = RandomBatches(preset, phase)
    train = partial(stage_2.adversarial, phase, start, Path("base"), settings)
    return live_update(preset, stage_2, "adversarial_networks", batches, train, monkeypatch)


def measured_1(preset, kind, monkeypatch) -> int:
    """The most bytes during one update of stage 1 on samples of this kind."""
    module, networks, train = {
        "consistency": (consistency, "distillation_networks", consistency.distill),
        "dmd": (dmd, "matching_networks", dmd.match_distributions),
    }[preset.distill.method]
    train = partial(train, Path("base"), preset)
    return live_update(preset, module, networks, Batches(preset, kind), train, monkeypatch)


def check(mode, phase, step, checkpointing, monkeypatch, *more):
    of_phase = f"stage2.budget.{phase}"
    preset = load_preset(
        "wan2.1-1.3b-480p",
        (
            *SMALL,
            f"mode={mode}",
            f"checkpointing={checkpointing}",
            f"{of_phase}.discriminator_step={step}",
            f"{of_phase}.batch=2",
            f"{of_phase}.warmup=0",
            *more,
        ),
        ("train", "data"),
    )
    assert account(preset, phase, "budget").bytes == pytest.approx(
        measured(preset, phase, monkeypatch), rel=0.1
    )


@pytest.mark.parametrize(
    "mode, phase",
    [
        ("full", "image"),
        ("lora", "video"),
        pytest.param("full", "video", marks=pytest.mark.slow),
        pytest.param("lora", "image", marks=pytest.mark.slow),
    ],
)
def test_an_update_with_two_passes_and_checkpoints(mode, phase, monkeypatch):
    """In the image phase states are nine tenths of it, in the video phase of a LoRA half."""
    check(mode, phase, "two_pass", "blocks", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, checkpointing",
    [("separate", "blocks"), ("batched", "blocks"), ("two_pass", "none"), ("separate", "none")],
)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_other_ways_to_the_same_update(mode, step, checkpointing, monkeypatch):
    check(mode, "video", step, checkpointing, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["image", "video"])
def test_an_mmdit(phase, monkeypatch):
    """Fitted to nothing: its blocks keep what Wan's keep. Text of 64 tokens goes through them too."""
    check("full", phase, "two_pass", "blocks", monkeypatch, "model.kind=mmdit", "model.ffn=512", "frames=17")


@pytest.mark.slow
@pytest.mark.parametrize("discriminator_start", ["base", "start"])
def test_a_start_that_changes_whole_matrices(discriminator_start, tmp_path, monkeypatch):
    """What a LoRA changes beside adapters lies in memory for each network that starts from it."""
    of_phase = "stage2.budget.video"
    preset = load_preset(
        "wan2.1-1.3b-480p",
        (
            *SMALL,
            "mode=lora",
            f"{of_phase}.batch=2",
            f"{of_phase}.warmup=0",
            f"{of_phase}.discriminator_start={discriminator_start}",
        ),
        ("train", "data"),
    )
    shapes = official_shapes(build_backbone(preset.model, "meta", torch.float32))
    matrices = [name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    changes = {f"diffusion_model.{name.removesuffix('.weight')}.diff": shapes[name] for name in matrices}
    path = tmp_path / "start.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in changes.items()}, path)
    frozen = open_start(path, preset, None).frozen
    assert account(preset, "video", "budget", 1, frozen).bytes == pytest.approx(
        measured(preset, "video", monkeypatch, path), rel=0.1
    )


def check_stage_1(method, mode, kind, checkpointing, monkeypatch, *more):
    preset = load_preset(
        "wan2.1-1.3b-480p",
        (
            *SMALL,
            f"mode={mode}",
            f"checkpointing={checkpointing}",
            f"method={method}",
            f"video_share={1 if kind == 'video' else 0}",
            "batch_image=2",
            "batch_video=2",
            *more,
        ),
        ("distill", "train", "data"),
    )
    assert account(preset, "distill").bytes == pytest.approx(measured_1(preset, kind, monkeypatch), rel=0.1)


@pytest.mark.parametrize(
    "method, mode, kind",
    [
        ("consistency", "full", "video"),
        ("consistency", "lora", "image"),
        ("dmd", "lora", "image"),
        pytest.param("consistency", "full", "image", marks=pytest.mark.slow),
        pytest.param("consistency", "lora", "video", marks=pytest.mark.slow),
        pytest.param("dmd", "full", "image", marks=pytest.mark.slow),
        pytest.param("dmd", "full", "video", marks=pytest.mark.slow),
        pytest.param("dmd", "lora", "video", marks=pytest.mark.slow),
    ],
)
def test_an_update_of_stage_1(method, mode, kind, monkeypatch):
    """Of images alone, where states are most of it: a quarter of them the fake score's. An account that
    counted clips too would be too large.
    """
    check_stage_1(method, mode, kind, "blocks", monkeypatch, f"lora_rank={64 if kind == 'image' else 8}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("method", ["consistency", "dmd"])
def test_stage_1_without_checkpoints(method, mode, monkeypatch):
    """The scores of dmd look at a sample while the pass that made it is kept: their own pass counts too."""
    check_stage_1(method, mode, "video", "none", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method, setting", [("consistency", "target_decay=0"), ("dmd", "regression=1")])
def test_stage_1_by_other_settings(method, setting, monkeypatch):
    """Without a target network, and with samples of the base."""
    check_stage_1(method, "full", "video", "blocks", monkeypatch, setting)
