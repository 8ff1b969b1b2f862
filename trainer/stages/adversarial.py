"""Stage 2 (sections 3.3 to 3.5): adversarial post-training of the one-step generator, one phase per call."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.errors import AptError
from apt_core.files.tensorfile import write_tensors
from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward, penalty_floor
from apt_core.method.optim import make_rmsprop
from trainer.config import Adversarial
from trainer.data.batches import Micro
from trainer.data.sampling import discriminator_times, split
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.run.folders import DIFFERENCES
from trainer.run.state import Keep, Run
from trainer.stages.averages import Averages
from trainer.stages.networks import Start, adversarial_networks
from trainer.stages.setup import Setup
from trainer.stages.watch import Measure, Watch


def adversarial(
    phase: str,
    start: Start | Path,
    base: Path,
    settings: Adversarial,
    setup: Setup,
    *,
    head_width: int | None = None,
    watch_every: int = 0,
    measures: Mapping[str, Measure] | None = None,
) -> list[dict]:
    """Train one phase ("image" or "video") and write the generator's EMA.

    The discriminator and the generator draw different real batches, and each draws its own t.

    start: the generator's first weights (the distilled model, or the image phase's EMA), or their path.
    base: file of the original model. The discriminator starts from it in both phases, unless
        `settings.discriminator_start` says otherwise.
    head_width: see `adversarial_networks`.
    watch_every: updates between two measurements of the discriminator on the samples that the batches hold
        out (see trainer.stages.watch); 0 turns them off. measures: what to measure on the fakes then.

    Returns the history, one row per update. Raises AptError when a checkpoint is damaged, when a batch does
    not divide over processes and microbatches, or when a loss or gradient is not finite. Raises Preempted
    after SIGTERM, once the state is saved.
    """
    objective = settings.objective()
    batches, world, parallel, seed = setup.batches, setup.world, setup.parallel, setup.seed
    check_batch(objective, settings.batch, world, parallel)
    torch.manual_seed(seed)  # the discriminator's heads draw their first weights from it
    networks = adversarial_networks(
        start,
        base,
        setup.load,
        world,
        parallel,
        setup.lora,
        head_width,
        taps=settings.taps,
        discriminator_start=settings.discriminator_start,
        train_backbone=settings.train_backbone,
    )
    generator, discriminator = networks.generator, networks.discriminator
    g_optimizer = make_rmsprop(generator.parameters(), settings.lr_generator)
    d_optimizer = make_rmsprop(discriminator_groups(discriminator, settings), settings.lr_discriminator)
    g = setup.learner("generator", generator, g_optimizer, networks, parallel.generator_zero)
    d = setup.learner("discriminator", discriminator, d_optimizer, networks, parallel.discriminator_zero)
    averages = Averages(networks, (settings.ema_decay, *setup.ema_decays), settings.ema_warmup)
    identity = {
        "phase": phase,
        "seed": seed,
        "data": batches.fingerprint,
        "lora": str(setup.lora),
        "head_width": head_width,
        "ema_decays": list(setup.ema_decays),
        "differences": networks.differences_digest(),
    }
    # These two may change when a run goes on: what it has computed so far does not depend on them.
    identity |= settings.model_dump(exclude={"updates", "discriminator_step"})
    watch = None
    if watch_every and batches.held[phase]:
        at_once = parallel.microbatch or len(batches.held[phase])
        watch = Watch(
            batches.datasets[phase],
            batches.held[phase],
            watch_every,
            at_once,
            seed,
            settings.shift,
            world,
            settings.discriminator_time,
            measures,
        )
        watch.begin(generator)  # before a state is loaded
    if keep := setup.keep:
        keep = replace(keep, describe=partial(_describe, keep, networks.differences()))
    parts = {"generator": g, "discriminator": d, "averages": averages}
    run = Run(keep, world, identity, parts, setup.resume)

    def take(role: str, update: int):
        return batches.take(phase, f"{phase}/{role}", update, settings.batch, world, parallel.microbatch)

    def draw(role: str, micro: Micro):
        """Real samples, text, noise and t of a microbatch. Noise and t depend only on the seed, the role and
        the sample's number.
        """
        z = sample_noise(micro.numbers, micro.x.shape[1:], seed, f"{phase}/{role}/z")
        t = discriminator_times(
            micro.numbers, seed, f"{phase}/{role}/t", settings.shift, settings.discriminator_time
        )
        return (part.to(world.device) for part in (micro.x, micro.text, z, t))

    total, strengths = settings.warmup + settings.updates, objective.gammas()
    with run:
        for update in range(run.update, total):
            if d.steps == update:  # a run may have stopped after the discriminator's step of this update
                for micro in d.microbatches(take("d", update), run.stop):
                    x, text, z, t = draw("d", micro)
                    with torch.no_grad():
                        fake = one_step(generator, z, text)
                    part, penalties = share_of_penalties(objective, micro, settings.batch, world)
                    noises = [
                        noise if noise is None else noise.to(world.device)
                        for noise in draw_noises(part, micro, seed, phase)
                    ]
                    floor = {}
                    if update == 0 and part.r1_weight:
                        n = len(noises[0])
                        floor["r1_floor"] = penalty_floor(
                            discriminator,
                            x[:n],
                            t[:n],
                            text[:n],
                            noises[0],
                            objective.r1_sigma,
                            objective.r1_sigma_time,
                        )
                    metrics = discriminator_backward(
                        discriminator,
                        part,
                        x,
                        fake,
                        text,
                        t,
                        *noises,
                        mode=settings.discriminator_step,
                        loss_scale=micro.share,
                    )
                    shares = {name: penalties for name in ("r1", "r2", "r1_floor")}
                    # The penalties' losses already carry `penalties`: it is in the weights of `part`.
                    shares |= {f"{name}_loss": micro.share for name in ("r1", "r2")}
                    d.add(
                        {
                            name: value * shares.get(name, micro.share)
                            for name, value in (metrics | floor).items()
                            if name not in strengths
                        }
                    )
                run.rows.append(d.step() | strengths)

            if update >= settings.warmup:
                for micro in g.microbatches(take("g", update), run.stop):
                    x, text, z, t = draw("g", micro)
                    real = x if objective.relativistic else None
                    metrics = generator_backward(
                        generator, discriminator, objective, z, text, t, real=real, loss_scale=micro.share
                    )
                    g.add(
                        {
                            f"g_{name.removeprefix('g_')}": value * micro.share
                            for name, value in metrics.items()
                        }
                    )
                run.rows[-1] |= g.step()
                averages.update()
            if watch and watch.due(update + 1):
                run.rows[-1] |= watch(update + 1, generator, discriminator)
            run.finish_update()
            if setup.samples:
                setup.samples.show(update + 1, generator, averages, world)
            setup.report(update + 1, total, run.rows[-1])

    facts = {"kind": "generator", "phase": phase, "updates": settings.updates}
    averages.save(setup.out, setup.metadata | facts, world)
    return run.rows


def _describe(keep: Keep, others: Mapping[str, Tensor]) -> None:
    """What belongs beside the states, and what the generator has beside its adapters."""
    if keep.describe:
        keep.describe()
    if others:
        tensors = {name: value.detach().cpu() for name, value in others.items()}
        write_tensors(keep.folder / DIFFERENCES, tensors, {})
    else:
        (keep.folder / DIFFERENCES).unlink(missing_ok=True)


def discriminator_groups(discriminator: nn.Module, settings: Adversarial) -> list[dict]:
    """Optimizer groups of the discriminator's trainable parameters. With `lr_heads` set, the backbone learns
    at `lr_discriminator` and the rest (heads, norm, logit) at `lr_heads`; without it there is one group.
    """
    named = [(name, p) for name, p in discriminator.named_parameters() if p.requires_grad]
    if settings.lr_heads is None:
        return [{"params": [p for _, p in named]}]
    rates = {True: settings.lr_discriminator, False: settings.lr_heads}
    groups = {old: [p for name, p in named if name.startswith("backbone.") is old] for old in rates}
    return [{"params": params, "lr": rates[old]} for old, params in groups.items() if params]


def check_batch(objective: Objective, batch: int, world: World, parallel: Parallel) -> None:
    """Raises AptError when a batch does not divide over processes and microbatches, or when `reg_fraction`
    leaves some processes without a sample for the penalties (aR1, aR2) in a microbatch.
    """
    step = len(split(batch, world.dp, world.dp_rank, parallel.microbatch)[0]) * world.dp
    penalised = objective.regularized(batch)
    if 0 < penalised % step < world.dp:
        raise AptError(
            f"reg_fraction={objective.reg_fraction} of a batch of {batch} is {penalised} samples for the "
            f"penalties, which leaves some of {world.dp} processes without one in a microbatch: choose it so "
            f"that the number of samples is a multiple of {world.dp}."
        )


def share_of_penalties(
    objective: Objective, micro: Micro, batch: int, world: World
) -> tuple[Objective, float]:
    """The objective for one microbatch, and the microbatch's share of the penalties' mean.

    The penalties see the first `reg_fraction` of the whole batch, however the batch is divided. So each
    microbatch gets its own `reg_fraction`, and penalty weights scaled by its share.
    """
    penalised = objective.regularized(batch)
    here = sum(place < penalised for place in micro.places)
    share = here * world.dp / penalised
    scale = share / micro.share
    fraction = here / len(micro.places) if here else 1.0
    part = replace(
        objective,
        r1_weight=objective.r1_weight * scale,
        r2_weight=objective.r2_weight * scale,
        reg_fraction=fraction,
    )
    return part, share


def draw_noises(objective: Objective, micro: Micro, seed: int, phase: str) -> list[Tensor | None]:
    """Standard normal noise for aR1 (real samples) and aR2 (fake samples) of a microbatch, for the samples
    that the objective penalises. None for a penalty whose weight is 0.
    """
    numbers = micro.numbers[: objective.regularized(len(micro.numbers))]
    weights = {"r1": objective.r1_weight, "r2": objective.r2_weight}
    return [
        sample_noise(numbers, micro.x.shape[1:], seed, f"{phase}/d/{name}") if weight else None
        for name, weight in weights.items()
    ]
