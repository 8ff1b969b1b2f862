"""Stage 2 (3.3 to 3.5): adversarial post-training of the one-step generator, one phase at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.errors import AptError
from apt_core.loading.checkpoint import load_transformer
from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward, penalty_floor
from apt_core.method.optim import make_rmsprop
from trainer.config import Adversarial
from trainer.data.batches import Batches, Micro
from trainer.data.sampling import discriminator_times, split
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.run.state import Keep, Run
from trainer.stages.averages import Averages
from trainer.stages.networks import Load, Lora, adversarial_networks
from trainer.stages.samples import Samples
from trainer.stages.update import Learner, Report
from trainer.stages.watch import Measure, Watch


def adversarial(
    phase: str,
    start: Path,
    base: Path,
    batches: Batches,
    settings: Adversarial,
    out: Path,
    *,
    seed: int,
    metadata: dict,
    world: World = World(),
    parallel: Parallel = Parallel(),
    lora: Lora | None = None,
    head_width: int | None = None,
    ema_decays: Sequence[float] = (),
    keep: Keep | None = None,
    resume: bool = True,
    samples: Samples | None = None,
    watch_every: int = 0,
    measures: Mapping[str, Measure] | None = None,
    load: Load = load_transformer,
    report: Report,
) -> list[dict]:
    """Train one phase ("image" or "video") and write the generator's EMA to `out`.

    start: the generator's first weights (the distilled model, or the image phase's EMA); base: the original
    weights, which the discriminator starts from in both phases (but for `settings.discriminator_start`).
    Discriminator and generator draw different real batches and their own t.
    world, parallel: on which processes, and how; all of them call alike. lora: train adapters and the
    discriminator's heads over one frozen base instead of whole networks. head_width: see
    `adversarial_networks`. ema_decays: of further averages, each written beside `out`.
    keep: where training states go; `resume` goes on from the newest. samples: pictures while it
    trains. watch_every: updates between two looks at the discriminator on the samples that `batches` holds
    out (trainer.stages.watch), 0: none; measures: of the fakes that it then makes. load(path, device=...): reads a network, or with device "meta" builds
    it without weights.

    Returns the history, one row an update. Raises AptError when a checkpoint is damaged, a batch does not
    divide, or a loss or gradient is not finite, and Preempted after SIGTERM when all is saved.
    """
    objective = settings.objective()
    check_batch(objective, settings.batch, world, parallel)
    torch.manual_seed(seed)  # the heads' first weights
    networks = adversarial_networks(
        start,
        base,
        load,
        world,
        parallel,
        lora,
        head_width,
        taps=settings.taps,
        discriminator_start=settings.discriminator_start,
        train_backbone=settings.train_backbone,
    )
    generator, discriminator = networks.generator, networks.discriminator
    notes = keep and keep.folder
    g_optimizer = make_rmsprop(generator.parameters(), settings.lr_generator)
    d_optimizer = make_rmsprop(discriminator_groups(discriminator, settings), settings.lr_discriminator)
    g = Learner(
        "generator", generator, g_optimizer, networks, world, parallel, parallel.generator_zero, notes
    )
    d = Learner(
        "discriminator",
        discriminator,
        d_optimizer,
        networks,
        world,
        parallel,
        parallel.discriminator_zero,
        notes,
    )
    averages = Averages(networks, (settings.ema_decay, *ema_decays), settings.ema_warmup)
    identity = {
        "phase": phase,
        "seed": seed,
        "data": batches.fingerprint,
        "lora": str(lora),
        "head_width": head_width,
        "ema_decays": list(ema_decays),
    }
    # the updates so far are the same for all values of these
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
    run = Run(keep, world, identity, {"generator": g, "discriminator": d, "averages": averages}, resume)

    def take(role: str, update: int):
        return batches.take(phase, f"{phase}/{role}", update, settings.batch, world, parallel.microbatch)

    def draw(role: str, micro: Micro):
        """Real samples, text, noise and t of a microbatch, the last two functions of (seed, role, sample
        number).
        """
        z = sample_noise(micro.numbers, micro.x.shape[1:], seed, f"{phase}/{role}/z")
        t = discriminator_times(
            micro.numbers, seed, f"{phase}/{role}/t", settings.shift, settings.discriminator_time
        )
        return (part.to(world.device) for part in (micro.x, micro.text, z, t))

    total, strengths = settings.warmup + settings.updates, objective.gammas()
    with run:
        for update in range(run.update, total):
            if d.steps == update:  # a run may have been stopped between the two
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
                    # `part` has the share in its weights
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
            if samples:
                samples.show(update + 1, generator, averages, world)
            report(update + 1, total, run.rows[-1])

    facts = {"kind": "generator", "phase": phase, "updates": settings.updates}
    averages.save(out, metadata | facts, world)
    return run.rows


def discriminator_groups(discriminator: nn.Module, settings: Adversarial) -> list[dict]:
    """Parameter groups of what is trained of the discriminator: the backbone at `lr_discriminator`, what is
    new at `lr_heads`, where that is another rate.
    """
    named = [(name, p) for name, p in discriminator.named_parameters() if p.requires_grad]
    if settings.lr_heads is None:
        return [{"params": [p for _, p in named]}]
    rates = {True: settings.lr_discriminator, False: settings.lr_heads}
    groups = {old: [p for name, p in named if name.startswith("backbone.") is old] for old in rates}
    return [{"params": params, "lr": rates[old]} for old, params in groups.items() if params]


def check_batch(objective: Objective, batch: int, world: World, parallel: Parallel) -> None:
    """Raises AptError when a batch does not divide over the processes and microbatches, or the samples that
    penalties see do not reach all processes.
    """
    step = len(split(batch, world.dp, world.dp_rank, parallel.microbatch)[0]) * world.dp
    penalised = objective.regularized(batch)
    if 0 < penalised % step < world.dp:
        raise AptError(
            f"reg_fraction {objective.reg_fraction} of a batch of {batch} is {penalised} samples, which leaves some of {world.dp} processes "
            f"without one in a microbatch: choose it so that the samples are a multiple of {world.dp}."
        )


def share_of_penalties(
    objective: Objective, micro: Micro, batch: int, world: World
) -> tuple[Objective, float]:
    """The objective for one microbatch, so that the whole batch's penalties see the batch's first samples
    however it is divided, and this microbatch's share of their mean.
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
    """Standard noise for the penalties on real and on fake samples of a microbatch, of those that the
    objective penalises alone; None for none.
    """
    numbers = micro.numbers[: objective.regularized(len(micro.numbers))]
    weights = {"r1": objective.r1_weight, "r2": objective.r2_weight}
    return [
        sample_noise(numbers, micro.x.shape[1:], seed, f"{phase}/d/{name}") if weight else None
        for name, weight in weights.items()
    ]
