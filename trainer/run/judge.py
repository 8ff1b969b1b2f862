"""A number for how good a generator is at the moment, cheap and the same for any model: which of a run's
states to keep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from trainer.data.batches import Batches
from trainer.data.sampling import EpochSampler
from trainer.machines.distributed import World


class LatentJudge:
    """Distance between real latents and one-step samples of their captions from fixed noise, in statistics of
    each sample.

    count: samples of `kind` to compare, or all where there are fewer; which ones, and their noise, follow
    from the seed. It is called by all processes alike, which share the samples, and gives all of them the
    same number, the lower the better; see `distance`. It costs a forward pass a sample, and ranks the states
    of one run: between models or data sets it means nothing.
    """

    def __init__(self, batches: Batches, kind: str, count: int, seed: int, world: World) -> None:
        data = batches.datasets[kind]
        count = min(count, len(data))
        order = EpochSampler(len(data), count, seed, "judge").batch(0)
        self.numbers = world.share(count)
        self.samples = [order[number % count] for number in self.numbers]
        self.data, self.count, self.seed, self.world = data, count, seed, world
        self.real = self._gather([statistics(self.data.get(i)[0]) for i in self.samples])

    @torch.no_grad()
    def __call__(self, generator: nn.Module) -> float:
        made = []
        for number, i in zip(self.numbers, self.samples):
            x, text, _ = self.data.batch([i])
            z = sample_noise([number], x.shape[1:], self.seed, "judge/z")
            made.append(
                statistics(
                    one_step(generator, z.to(self.world.device), text.to(self.world.device))[0].float().cpu()
                )
            )
        return distance(self._gather(made), self.real)

    def _gather(self, mine: Sequence[Tensor]) -> Tensor:
        return self.world.gather_rows(torch.stack(list(mine)), self.count)


def statistics(x: Tensor) -> Tensor:
    """Latent `[C, F, h, w]` to `[4 C]`: of each channel the mean, the standard deviation, and the root mean
    square of its differences in space (detail) and from frame to frame (motion; 0 for an image).
    """
    flat = x.flatten(1)
    space = (x.diff(dim=2).square().flatten(1).mean(1) + x.diff(dim=3).square().flatten(1).mean(1)).sqrt()
    motion = x.diff(dim=1).square().flatten(1).mean(1).sqrt() if x.shape[1] > 1 else torch.zeros_like(space)
    return torch.cat([flat.mean(1), flat.std(1), space, motion])


def distance(made: Tensor, real: Tensor) -> float:
    """Frechet distance between Gaussians of independent features, in units of the real ones' spread, mean
    over features.

    made, real: `[n, features]`. With independent features it asks for few samples; samples that are all alike
    show as missing spread.
    """
    made, real = made.double(), real.double()
    unit = real.std(0).clamp(min=1e-6) if len(real) > 1 else torch.ones_like(real[0])
    spread = (made.std(0) - real.std(0)).square() if len(real) > 1 else 0.0
    return float((((made.mean(0) - real.mean(0)).square() + spread) / unit.square()).mean())
