"""Stage 1 (section 3.2): consistency distillation of the base model, with guidance, into one step. Its EMA
is the generator that stage 2 starts from.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from apt_core.method.consistency import consistency_backward
from apt_core.method.flow import sample_noise, sample_uniform
from apt_core.method.optim import step_in_turn
from trainer.config import Distill, Preset
from trainer.data.batches import Batches
from trainer.data.sampling import split
from trainer.run.state import Run
from trainer.stages.averages import Averages
from trainer.stages.muon import Muon
from trainer.stages.networks import distillation_networks
from trainer.stages.setup import Setup


def distill(base: Path, preset: Preset, setup: Setup) -> list[dict]:
    """Distil `base` (a checkpoint file) and write the student's EMA.

    Each update trains on images or on clips, chosen at random with the preset's `video_share`. The result and
    the errors are those of `trainer.stages.adversarial.adversarial`.
    """
    settings = preset.distill
    batches, world, parallel, seed = setup.batches, setup.world, setup.parallel, setup.seed
    for size in (settings.batch_image, settings.batch_video):
        split(size, world.dp, world.dp_rank, parallel.microbatch)
    torch.manual_seed(seed)  # the adapters' first weights
    networks = distillation_networks(
        base, setup.load, world, parallel, setup.lora, target=settings.target_decay > 0
    )
    student, teacher, target = networks.generator, networks.teacher, networks.target
    negative = batches.embed([preset.sampling.negative_prompt]).to(world.device)
    optimizer = make_optimizer(settings, student.parameters())
    learner = setup.learner("student", student, optimizer, networks, parallel.generator_zero)
    averages = Averages(networks, (settings.ema_decay, *setup.ema_decays), settings.ema_warmup)
    following = Averages(
        networks, (settings.target_decay,) if target is not None else (), settings.target_warmup
    )
    parts = {"student": learner, "averages": averages, "target": following}
    run = Run(setup.keep, world, identity_of(preset, setup), parts, setup.resume, idle=settings.idle)
    if target is not None:
        following.copy_to(target)

    kind_and_size = kinds_and_sizes(settings, batches, seed)
    with run:
        for update in range(run.update, settings.updates):
            kind, size = kind_and_size(update)
            batch = batches.take(
                kind, "distill", update, size, world, parallel.microbatch, following=kind_and_size(update + 1)
            )
            consistency = settings.consistency(preset.sampling.shift(kind))
            for micro in learner.microbatches(batch, run.stop):
                x, text = micro.x.to(world.device), micro.text.to(world.device)
                z = sample_noise(micro.numbers, x.shape[1:], seed, "distill/z").to(world.device)
                u = sample_uniform(micro.numbers, seed, "distill/u").to(world.device)
                metrics = consistency_backward(
                    student,
                    teacher,
                    consistency,
                    x,
                    z,
                    text,
                    negative,
                    u,
                    target=target,
                    loss_scale=micro.share,
                )
                # A mean over only some samples, so microbatches add their sums; divided after the step.
                metrics["cd_loss_final"] *= metrics["final_share"]
                learner.add({name: value * micro.share for name, value in metrics.items()})
            optimizer.param_groups[0]["lr"] = settings.rate(update)
            row = learner.step()
            row["cd_loss_final"] /= row["final_share"] or 1
            run.rows.append(
                {
                    name if name.endswith("gradient") else f"{name}_{kind}": value
                    for name, value in row.items()
                }
            )
            averages.update()
            if target is not None:
                following.update()
                following.copy_to(target)
            run.finish_update()
            if setup.samples:
                setup.samples.show(update + 1, student, averages, world)
            setup.report(update + 1, settings.updates, run.rows[-1])

    facts = {"kind": "generator", "phase": "distilled", "updates": settings.updates}
    averages.save(setup.out, setup.metadata | facts, world)
    return run.rows


def make_optimizer(settings: Distill, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Of the settings' kind; its rate is set before each step."""
    if settings.optimizer == "muon":
        return Muon(parameters, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    step_in_turn(optimizer)
    return optimizer


def identity_of(preset: Preset, setup: Setup) -> dict:
    """What makes two runs of stage 1 the same run. The settings of the other method are not among it."""
    settings = preset.distill
    return {
        "phase": "distilled",
        "seed": setup.seed,
        "data": setup.batches.fingerprint,
        "lora": str(setup.lora),
        "ema_decays": list(setup.ema_decays),
        "sampling": preset.sampling.model_dump(exclude={"prompts"}),
        **settings.model_dump(exclude=settings.idle | ({"updates"} if settings.lr_end is None else set())),
    }


def kinds_and_sizes(settings: Distill, batches: Batches, seed: int) -> Callable[[int], tuple[str, int]]:
    """By the number of an update: whether it sees images or clips, drawn with their share, and how many."""

    def kind_and_size(update: int) -> tuple[str, int]:
        of_video = float(sample_uniform([update], seed, "distill/kind")) < settings.video_share
        kind = batches.available("video" if of_video else "image")
        return kind, settings.batch_video if kind == "video" else settings.batch_image

    return kind_and_size
