"""Held-out samples, which no update sees: how well the discriminator tells them from generated ones, and how
much the generated ones move.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from apt_core.method.objectives import verdict
from trainer.data.sampling import discriminator_times
from trainer.data.shards import ShardDataset
from trainer.machines.distributed import World


@dataclass(frozen=True)
class Measure:
    """A figure to watch. of: latents `[B, C, F, h, w]` to one number each `[B]`, on the CPU. samples: use at
    most this many samples. every: take it at every n-th measurement.
    """

    of: Callable[[Tensor], Tensor]
    samples: int | None = None
    every: int = 1


class Watch:
    """Measures the discriminator on held-out real samples and on new fakes made from their captions, and
    compares the fakes with the real samples by other measures.

    A discriminator that is right in training but only at chance here has memorised its real samples.

    data, held: the real samples, by their positions in `data`; all have one shape (see Batches.held).
    every: updates between two measurements.
    at_once: samples that a process passes through a network together.
    shift, time: `shift` and `discriminator_time` of training, see trainer.config.Adversarial.
    measures: by the name that their columns begin with.

    The samples are divided over the processes. All of them must call this together, and all get the same
    numbers.
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
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        count, mine = len(held), world.share(len(held))
        self.parts = [mine[first : first + at_once] for first in range(0, len(mine), at_once)]
        self.data, self.held, self.count, self.every = data, held, count, every
        self.seed, self.shift, self.time, self.world = seed, shift, time, world
        self.measures = dict(measures or {})
        self.real: dict[str, float] = {}
        self.start: dict[str, float] = {}

    def due(self, update: int) -> bool:
        """Whether to measure after this many updates."""
        return bool(self.held) and update % self.every == 0

    @torch.no_grad()
    def begin(self, generator: nn.Module) -> None:
        """Measure the real samples, and what the generator makes before its first update."""
        real, made = [], []
        for part, _, x, _, fake in self._fakes(generator, 0):
            real.append(self._measured(x, part, self.measures))
            made.append(self._measured(fake, part, self.measures))
        self.real, self.start = self._means(real), self._means(made)

    @torch.no_grad()
    def __call__(self, update: int, generator: nn.Module, discriminator: nn.Module) -> dict[str, float]:
        """Metrics for the history's row: held_right_real, held_right_fake and held_right_pairs (see
        objectives.verdict; chance is 0.5), and held_gap, the mean logit of the real samples minus that of
        the fakes. For each measure M that is due, M_of_real and M_of_start: its mean over the fakes, divided
        by that over the real samples and by that over the fakes before the first update (`begin`). Noise and
        t are drawn anew each time.
        """
        due = [name for name, measure in self.measures.items() if update // self.every % measure.every == 0]
        logits, made = [], []
        for part, fresh, x, text, fake in self._fakes(generator, update):
            t = discriminator_times(fresh, self.seed, "watch/t", self.shift, self.time).to(self.world.device)
            x = x.to(self.world.device)
            logits.append(torch.stack([discriminator(x, t, text), discriminator(fake, t, text)], dim=1))
            made.append(self._measured(fake, part, due))
        real, fake = self.world.gather_rows(torch.cat(logits), self.count).unbind(1)
        found = verdict(real, fake) | {"gap": real.mean() - fake.mean()}
        row = {f"held_{name}": float(value) for name, value in found.items()}
        for name, mean in self._means(made).items():
            for other, means in (("real", self.real), ("start", self.start)):
                if means.get(name, 0.0) > 0:
                    row[f"{name}_of_{other}"] = mean / means[name]
        return row

    def _fakes(self, generator: nn.Module, update: int) -> Iterator[tuple]:
        """The samples of this process, part by part: (positions within the held-out samples, sample numbers
        of the run, real latents, text, fake latents).
        """
        for part in self.parts:
            x, text, _ = self.data.batch([self.held[number % self.count] for number in part])
            fresh = [update * self.count + number for number in part]
            z = sample_noise(fresh, x.shape[1:], self.seed, "watch/z").to(self.world.device)
            text = text.to(self.world.device)
            yield part, fresh, x, text, one_step(generator, z, text)

    def _measured(self, x: Tensor, part: Sequence[int], names: Iterable[str]) -> dict[str, Tensor]:
        """By name `[b]`, NaN for samples that a measure leaves out."""
        found = {}
        for name in names:
            measure = self.measures[name]
            within = sum(number < (measure.samples or self.count) for number in part)  # the numbers rise
            found[name] = torch.full((len(part),), torch.nan)
            if within:
                found[name][:within] = measure.of(x[:within].float().cpu())
        return found

    def _means(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """By name, over the samples of all processes."""
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        gathered = {name: self.world.gather_rows(mine, self.count) for name, mine in columns.items()}
        return {name: float(values.nanmean()) for name, values in gathered.items()}
