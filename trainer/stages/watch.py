"""How well the discriminator tells real samples from made ones, on samples that no update sees."""

from collections.abc import Sequence

import torch
from torch import nn

from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from apt_core.method.objectives import verdict
from trainer.data.sampling import discriminator_times
from trainer.data.shards import ShardDataset
from trainer.machines.distributed import World


class Watch:
    """The discriminator's verdict on held-out real samples and on fresh fakes of their texts.

    A discriminator that is right in training and at chance here has learned its real samples by heart.

    data, held: the real samples, by position, all of one shape (see Batches.held). every: updates between two
    looks; at_once: samples that a process takes through a network at once. shift, time: as of training, see
    trainer.config.Adversarial (discriminator_time). All processes call alike, share the samples, and get the
    same numbers.
    """

    def __init__(
        self,
        data: ShardDataset,
        held: Sequence[int],
        every: int,
        at_once: int,
        seed: int,
        shift: float,
        world: World,
        time: float | None = None,
    ) -> None:
        count, mine = len(held), world.share(len(held))
        self.parts = [mine[first : first + at_once] for first in range(0, len(mine), at_once)]
        self.data, self.held, self.count, self.every = data, held, count, every
        self.seed, self.shift, self.time, self.world = seed, shift, time, world

    def due(self, update: int) -> bool:
        """Whether to look after this many updates."""
        return bool(self.held) and update % self.every == 0

    @torch.no_grad()
    def __call__(self, update: int, generator: nn.Module, discriminator: nn.Module) -> dict[str, float]:
        """The row's part: held_right_real, held_right_fake, held_right_pairs (see objectives.verdict; 0.5 is
        chance) and held_gap, the mean logit of real samples minus that of fakes. Noise and t are drawn anew
        at each look.
        """
        logits = []
        for part in self.parts:
            x, text, _ = self.data.batch([self.held[number % self.count] for number in part])
            fresh = [update * self.count + number for number in part]
            z = sample_noise(fresh, x.shape[1:], self.seed, "watch/z").to(self.world.device)
            t = discriminator_times(fresh, self.seed, "watch/t", self.shift, self.time).to(self.world.device)
            x, text = x.to(self.world.device), text.to(self.world.device)
            logits.append(
                torch.stack(
                    [discriminator(x, t, text), discriminator(one_step(generator, z, text), t, text)], dim=1
                )
            )
        real, fake = self.world.gather_rows(torch.cat(logits), self.count).unbind(1)
        found = verdict(real, fake) | {"gap": real.mean() - fake.mean()}
        return {f"held_{name}": float(value) for name, value in found.items()}
