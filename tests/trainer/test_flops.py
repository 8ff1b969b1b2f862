"""The account's FLOPs against those of the real functions: torch's FlopCounterMode over whole updates on the
meta device.

Networks of 1 and 2 blocks are counted (3 and 4 where the discriminator has its three taps), and the line
through both is taken to the preset's depth: blocks are alike, and what is not in a block is there once. No
figure is of a card.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apt_core.method.consistency import consistency_backward
from apt_core.method.dmd import dmd_backward, fake_backward
from apt_core.method.generator import euler_cfg, one_step
from apt_core.method.objectives import discriminator_backward, generator_backward
from apt_core.models.lora import add_adapters, role
from apt_core.models.wan import tap_blocks
from trainer.bench.shapes import build_backbone
from trainer.config import PRESETS, load_preset
from trainer.machines.account import account
from trainer.machines.counts import adversarial_flops, cost, tokens
from trainer.stages.networks import make_discriminator

BATCH = 4  # of which reg_fraction 0.25 penalises one
ONE_TAP = "taps=[1.0]"
META = torch.device("meta")
ALL = sorted(path.stem for path in PRESETS.glob("*.toml"))


class NoModules:
    """In the place of FlopCounterMode's tracker of modules, which stumbles over parameters under no_grad."""

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def fused_attention(query, key, value, *args, **kwargs):
    """What scaled_dot_product_attention runs on a card; on meta it would keep the scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has none


def read(name, *overrides):
    return load_preset(name, ("context_parallel=1", *overrides), ("train", "data", "distill"))


def samples(preset, kind):
    """Latents, noise, text and times of a batch, without a byte."""
    model, (height, width) = preset.model, preset.data.size(kind)
    frames = preset.data.frames if kind == "video" else 1
    t, down, across = model.stride
    shape = (BATCH, model.channels, (frames - 1) // t + 1, height // down, width // across)
    return (
        torch.empty(shape, device=META),
        torch.empty(shape, device=META),
        torch.empty(BATCH, model.text_length, model.text_dim, device=META),
        torch.empty(BATCH, device=META),
    )


def networks(preset, layers, *roles):
    """One for each role, whole or on a shared base; None is the base alone."""
    model, train = preset.model.model_copy(update={"layers": layers}), preset.train
    if train.mode == "lora":
        base = build_backbone(model, META, torch.float32)
        add_adapters(base, [name for name in roles if name], train.lora_rank)
        built = [role(base, name) for name in roles]
    else:
        built = [build_backbone(model, META, torch.float32).requires_grad_(bool(name)) for name in roles]
    if train.checkpointing != "none":
        for network in built:
            network.enable_gradient_checkpointing()
    return built


def counted(run) -> float:
    """FLOPs per sample of `run()`."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return counter.get_total_flops() / BATCH


def at_depth(preset, few, fewer, more) -> float:
    """A count at the depth of the preset, from those at `few` blocks and at one more."""
    return fewer + (more - fewer) * (preset.model.layers - few)


def stage_2(preset, phase, recipe) -> tuple[float, float]:
    """Counted FLOPs per sample of (the discriminator's step, the generator's)."""
    settings = getattr(preset.phases(recipe), phase)
    objective = settings.objective()
    x, z, text, t = samples(preset, phase)

    def steps(layers):
        generator, backbone = networks(preset, layers, "generator", "discriminator")
        if not settings.train_backbone:
            backbone.requires_grad_(False)
        with META:
            discriminator = make_discriminator(backbone, settings.taps, preset.train.head_width)

        def discriminator_step():
            with torch.no_grad():
                fake = one_step(generator, z, text)
            discriminator_backward(
                discriminator, objective, x, fake, text, t, z, z, mode=settings.discriminator_step
            )

        def generator_step():
            generator_backward(generator, discriminator, objective, z, text, t, real=x)

        return counted(discriminator_step), counted(generator_step)

    few = len(settings.taps)
    return tuple(at_depth(preset, few, *counts) for counts in zip(steps(few), steps(few + 1)))


def check_stage_2(preset, phase, recipe):
    needed, settings = account(preset, phase, recipe), getattr(preset.phases(recipe), phase)
    of_discriminator, of_generator = stage_2(preset, phase, recipe)
    assert needed.flops / settings.batch == pytest.approx(of_discriminator + of_generator, rel=0.03)
    warmup = settings.warmup * settings.batch * of_discriminator
    assert needed.warmup == pytest.approx(warmup, rel=0.03)


@pytest.mark.parametrize("phase, mode", [("image", "full"), ("video", "lora")])
@pytest.mark.parametrize("name", ALL)
def test_an_update_of_stage_2(name, phase, mode):
    recipe = read(name).default_recipe
    check_stage_2(read(name, f"mode={mode}", f"stage2.{recipe}.{phase}.taps=[1.0]"), phase, recipe)


@pytest.mark.parametrize(
    "mode, overrides",
    [
        ("full", ("discriminator_step=batched", "checkpointing=none", ONE_TAP)),
        ("lora", ("discriminator_step=separate", "checkpointing=none", ONE_TAP)),
        ("lora", ("discriminator_step=separate", "head_width=256")),
        (
            "full",
            (
                "discriminator_step=batched",
                "relativistic=false",
                "r2_weight=0.0",
                "reg_fraction=1.0",
                ONE_TAP,
            ),
        ),
        ("full", ("train_backbone=false", "checkpointing=none", ONE_TAP)),
        ("lora", ("train_backbone=false", ONE_TAP)),
    ],
)
def test_each_saving(mode, overrides):
    preset = load_preset("wan2.1-1.3b-480p", (*overrides, f"mode={mode}"), ("stage2.budget.image", "train"))
    check_stage_2(preset, "image", "budget")


def test_no_block_runs_behind_the_last_tap():
    """At half the depth the discriminator costs half: counted at 2 and 4 blocks, of which it has 1 and 2."""
    preset = read("wan2.1-1.3b-480p", "stage2.budget.image.taps=[0.5]")
    objective = preset.phases("budget").image.objective()
    x, z, text, t = samples(preset, "image")

    def step(layers):
        generator, backbone = networks(preset, layers, "generator", "discriminator")
        with META:
            discriminator = make_discriminator(backbone, (0.5,), None)
        return counted(
            lambda: discriminator_backward(discriminator, objective, x, x, text, t, z, z, mode="two_pass")
        )

    two, four = step(2), step(4)
    fake = cost(preset, tokens(preset, "image"), False).forward

    def of_discriminator(preset):
        settings = preset.phase("image", "budget")
        taps = tap_blocks(preset.model.layers, settings.taps)
        return adversarial_flops(preset, settings, tokens(preset, "image"), taps)[0] - fake

    half = of_discriminator(preset)
    assert two + (four - two) / 2 * (preset.model.layers - 2) == pytest.approx(half, rel=0.03)
    whole = of_discriminator(read("wan2.1-1.3b-480p", "stage2.budget.image.taps=[1.0]"))
    assert half == pytest.approx(whole / 2, rel=0.03)


@pytest.mark.parametrize(
    "name, mode",
    [("wan2.1-1.3b-480p", "full"), ("wan2.2-5b", "lora"), ("seaweed-8b", "full"), ("mini", "lora")],
)
def test_an_update_of_stage_1(name, mode):
    preset = read(name, f"mode={mode}", "video_share=0.0")
    x, z, text, t = samples(preset, "image")
    settings = preset.distill.consistency(1.0)

    def update(layers):
        student, teacher, target = networks(preset, layers, "generator", None, "target")
        negative = torch.empty(1, *text.shape[1:], device=META)
        return counted(
            lambda: consistency_backward(student, teacher, settings, x, z, text, negative, t, target=target)
        )

    assert account(preset, "distill").flops / preset.distill.batch_image == pytest.approx(
        at_depth(preset, 1, update(1), update(2)), rel=0.03
    )


@pytest.mark.parametrize(
    "name, mode, overrides",
    [
        ("wan2.1-1.3b-480p", "full", ()),
        ("wan2.2-5b", "lora", ("regression=0.25", "regression_steps=3")),
        ("seaweed-8b", "full", ("guidance=1.0", "fake_updates=2")),
    ],
)
def test_an_update_of_stage_1_by_dmd(name, mode, overrides):
    preset = read(name, "distill.method=dmd", f"train.mode={mode}", "video_share=0.0", *overrides)
    settings, (_, z, text, t) = preset.distill, samples(preset, "image")
    negative, matching = torch.empty(1, *text.shape[1:], device=META), settings.matching(2.0)

    def update(layers):
        in_lora_mode = preset.model_copy(update={"train": preset.train.model_copy(update={"mode": "lora"})})
        generator, real, fake = networks(in_lora_mode, layers, "generator", None, "fake")
        if mode == "full":
            [generator] = networks(preset, layers, "generator")

        def run():
            for _ in range(settings.fake_updates):
                fake_backward(fake, generator, z, text, z, t)
            wanted = None
            if settings.regression:
                steps = settings.regression_steps
                wanted = euler_cfg(real, z, text, negative, steps, settings.guidance, 2.0)
            dmd_backward(generator, real, fake, matching, z, text, negative, z, t, wanted)

        return counted(run)

    assert account(preset, "distill").flops / settings.batch_image == pytest.approx(
        at_depth(preset, 1, update(1), update(2)), rel=0.03
    )
