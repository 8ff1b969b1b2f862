"""Stage 2 (3.3 to 3.5): adversarial post-training of the one-step generator, one phase at a time."""

from pathlib import Path

import torch

from apt_core.checkpoint import load_transformer, save_generator
from apt_core.discriminator import Discriminator
from apt_core.ema import Ema
from apt_core.flow import sample_noise, sample_uniform, shift
from apt_core.generator import one_step
from apt_core.objectives import discriminator_backward, generator_backward
from apt_core.optim import make_rmsprop
from trainer.batches import Batches
from trainer.config import Adversarial
from trainer.distill import Report
from trainer.log import History


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
    device: str = "cpu",
    report: Report,
) -> list[dict]:
    """Train one phase ("image" or "video") and write the generator's EMA to `out`.

    start: the generator's first weights (the distilled model, or the image phase's EMA); base: the original weights, which the
    discriminator starts from in both phases. Discriminator and generator draw different real batches and their own t.
    Returns the history, one row an update. Raises AptError when a checkpoint is damaged or a loss is not finite.
    """
    torch.manual_seed(seed)  # the heads' first weights
    generator = load_transformer(start, device=device)
    discriminator = Discriminator(load_transformer(base, device=device)).to(device)
    objective = settings.objective()
    generator_optimizer = make_rmsprop(generator.parameters(), settings.lr_generator)
    discriminator_optimizer = make_rmsprop(discriminator.parameters(), settings.lr_discriminator)
    ema = Ema(generator, settings.ema_decay, warmup=10)

    def draw(role: str, update: int):
        """A real batch with its noise and its t, each a function of (seed, role, sample number)."""
        stream = f"{phase}/{role}"
        numbers, x, text = batches.take(phase, stream, update, settings.batch)
        z = sample_noise(numbers, x.shape[1:], seed, f"{stream}/z")
        t = shift(sample_uniform(numbers, seed, f"{stream}/t"), settings.shift)
        return numbers, *(part.to(device) for part in (x, text, z, t))

    history = History()
    total = settings.warmup + settings.updates
    for update in range(total):
        numbers, x, text, z, t = draw("d", update)
        with torch.no_grad():
            fake = one_step(generator, z, text)
        noises = (sample_noise(numbers, x.shape[1:], seed, f"{phase}/d/{name}").to(device) for name in ("r1", "r2"))
        metrics = discriminator_backward(discriminator, objective, x, fake, text, t, *noises, mode=settings.mode)
        history.add(metrics)
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad(set_to_none=True)

        if update >= settings.warmup:
            _, x, text, z, t = draw("g", update)
            metrics = generator_backward(generator, discriminator, objective, z, text, t, real=x if objective.relativistic else None)
            history.extend({f"g_{name.removeprefix('g_')}": value for name, value in metrics.items()})
            generator_optimizer.step()
            generator_optimizer.zero_grad(set_to_none=True)
            ema.update(generator)
        report(update + 1, total, history.last())

    ema.copy_to(generator)
    facts = {"kind": "generator", "phase": phase, "updates": settings.updates, "ema": settings.ema_decay}
    save_generator(out, generator, generator.config, metadata | facts, torch.float32)
    return history.rows()
