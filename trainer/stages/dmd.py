"""Stage 1 by distribution matching: the generator's samples become those of the guided base, and no real
sample is looked at, only captions. See apt_core.method.dmd. Its EMA starts the generator of stage 2.
"""

from pathlib import Path

import torch

from apt_core.method.dmd import DmdSettings, dmd_backward, fake_backward, noise_times
from apt_core.method.flow import sample_noise, sample_uniform
from apt_core.method.generator import euler_cfg
from trainer.config import Preset
from trainer.data.batches import Micro
from trainer.data.sampling import split
from trainer.run.state import Run
from trainer.stages.averages import Averages
from trainer.stages.distill import identity_of, kinds_and_sizes, make_optimizer
from trainer.stages.networks import Lora, matching_networks
from trainer.stages.setup import Setup


def match_distributions(base: Path, preset: Preset, setup: Setup) -> list[dict]:
    """As `trainer.stages.distill.distill`, by the settings of dmd.

    An update is `fake_updates` of the fake score, each on fresh samples of the generator, and then one of the
    generator; all of them see images, or clips. The base is in memory once, frozen: as it is, it is the real
    score; with adapters the fake score; with `lora`, under other adapters, the generator too.
    """
    settings, count = preset.distill, preset.distill.fake_updates
    batches, world, parallel, seed = setup.batches, setup.world, setup.parallel, setup.seed
    for size in (settings.batch_image, settings.batch_video):
        split(size, world.dp, world.dp_rank, parallel.microbatch)
    torch.manual_seed(seed)  # the adapters' first weights
    own = Lora(preset.train.lora_rank, preset.train.lora_alpha)
    networks = matching_networks(base, setup.load, world, parallel, setup.lora, own)
    generator, real, fake = networks.generator, networks.teacher, networks.fake
    negative = batches.embed([preset.sampling.negative_prompt]).to(world.device)
    # The generator goes by stage 1's name for it, by which its states are found.
    g, f = (
        setup.learner(
            name,
            network,
            make_optimizer(settings, network.parameters()),
            networks,
            parallel.generator_zero,
        )
        for name, network in (("student", generator), ("fake", fake))
    )
    averages = Averages(networks, (settings.ema_decay, *setup.ema_decays), settings.ema_warmup)
    identity = identity_of(preset, setup) | {"fake": str(setup.lora or own)}
    parts = {"student": g, "fake": f, "averages": averages}
    pace = {"fake": count}
    run = Run(setup.keep, world, identity, parts, setup.resume, pace=pace, idle=settings.idle)
    kind_and_size = kinds_and_sizes(settings, batches, seed)

    def take(role: str, number: int, updates_each: int):
        """The batch of update `number` of a network, of which there are so many in an update of the stage."""
        kind, size = kind_and_size(number // updates_each)
        following = kind_and_size((number + 1) // updates_each)
        stream = f"distill/{role}"
        return batches.take(kind, stream, number, size, world, parallel.microbatch, following=following)

    def draw(role: str, micro: Micro, matching: DmdSettings) -> dict:
        """Text, noise and times of a microbatch, the last two functions of (seed, role, sample number)."""
        shape, stream = micro.x.shape[1:], f"distill/{role}"
        drawn = {
            "text": micro.text,
            "z": sample_noise(micro.numbers, shape, seed, f"{stream}/z"),
            "noise": sample_noise(micro.numbers, shape, seed, f"{stream}/noise"),
            "t": noise_times(sample_uniform(micro.numbers, seed, f"{stream}/t"), matching),
        }
        return {name: value.to(world.device) for name, value in drawn.items()}

    def note(row: dict[str, float]) -> None:
        """Figures of a step in the row of its update."""
        kind, _ = kind_and_size(run.update)
        if len(run.rows) == run.update:
            run.rows.append({})
        run.rows[-1] |= {
            name if name.endswith("gradient") else f"{name}_{kind}": value for name, value in row.items()
        }

    with run:
        for update in range(run.update, settings.updates):
            shift = preset.sampling.shift(kind_and_size(update)[0])
            matching = settings.matching(shift)

            for number in range(f.steps, (update + 1) * count):  # a run may have been stopped among them
                for micro in f.microbatches(take("fake", number, count), run.stop):
                    metrics = fake_backward(
                        fake, generator, **draw("fake", micro, matching), loss_scale=micro.share
                    )
                    f.add({name: value * micro.share for name, value in metrics.items()})
                f.optimizer.param_groups[0]["lr"] = settings.rate_of_fake(update)
                note(f.step())

            for micro in g.microbatches(take("generator", update, 1), run.stop):
                drawn, wanted = draw("generator", micro, matching), None
                if settings.regression:
                    steps = settings.regression_steps or preset.sampling.steps
                    wanted = euler_cfg(
                        real, drawn["z"], drawn["text"], negative, steps, settings.guidance, shift
                    )
                metrics = dmd_backward(
                    generator,
                    real,
                    fake,
                    matching,
                    negative=negative,
                    wanted=wanted,
                    loss_scale=micro.share,
                    **drawn,
                )
                g.add({f"dmd_{name}": value * micro.share for name, value in metrics.items()})
            g.optimizer.param_groups[0]["lr"] = settings.rate(update)
            note(g.step())
            averages.update()
            run.finish_update()
            if setup.samples:
                setup.samples.show(update + 1, generator, averages, world)
            setup.report(update + 1, settings.updates, run.rows[-1])

    facts = {"kind": "generator", "phase": "distilled", "updates": settings.updates}
    averages.save(setup.out, setup.metadata | facts, world)
    return run.rows
