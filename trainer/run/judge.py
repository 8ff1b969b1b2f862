"""A number for how good a generator is at the moment, cheap and the same for any model: which of a run's
states to keep.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from trainer.data.batches import Batches
from trainer.data.sampling import EpochSampler
from trainer.machines.distributed import World

LEAST_MOTION = (
    0.01  # of the real samples': what stands still is a hundred times as far away, and still a number
)


class LatentJudge:
    """Distance between real latents and one-step samples of their captions from fixed noise, in statistics of
    each sample, made larger where the samples move less than the real ones; see `guarded`.

    count: samples of `kind` to compare, or all where there are fewer; which ones, and their noise, follow
    from the seed. It is called by all processes alike, which share the samples, and gives all of them the
    same numbers: `judged`, the lower the better, and for clips `judged_motion`, their motion as a share of
    the real ones'. It costs a forward pass a sample, and ranks the states
    of one run: between models or data sets it means nothing.
    """

    def __init__(self, batches: Batches, kind: str, count: int, seed: int, world: World) -> None:
        data = batches.datasets[kind]
        count = min(count, len(data))
        order = EpochSampler(len(data), count, seed, "judge").batch(0)
        self.numbers = world.share(count)
        self.samples = [order[number % count] for number in self.numbers]
        self.data, self.count, self.seed, self.world = data, count, seed, world
        self.real, self.real_motion = self._measure(self.data.get(i)[0] for i in self.samples)

    @torch.no_grad()
    def __call__(self, generator: nn.Module) -> dict[str, float]:
        made, moving = self._measure(self._made(generator))
        if not self.real_motion > 0:
            return {"judged": distance(made, self.real)}
        share = moving / self.real_motion
        return {"judged": guarded(distance(made, self.real), share), "judged_motion": share}

    def _made(self, generator: nn.Module) -> Iterator[Tensor]:
        for number, i in zip(self.numbers, self.samples):
            x, text, _ = self.data.batch([i])
            z = sample_noise([number], x.shape[1:], self.seed, "judge/z")
            yield one_step(generator, z.to(self.world.device), text.to(self.world.device))[0].float().cpu()

    def _measure(self, mine: Iterable[Tensor]) -> tuple[Tensor, float]:
        """Of everybody's latents the statistics `[count, features]`, and the mean motion."""
        rows = [torch.cat([statistics(x), motion(x[None])]) for x in mine]
        found = self.world.gather_rows(torch.stack(rows), self.count)
        return found[:, :-1], float(found[:, -1].mean())


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


def motion(x: Tensor) -> Tensor:
    """Dynamic degree of latents `[B, C, F, h, w]` without optical flow, `[B]`: the standard deviation of each
    latent over time (root of the mean variance), over that of all latents of its channel. 0 for images.

    The twin of `trainer.evaluate.metrics.motion`, free of contrast as that is. The first latent frame counts
    only where there are two: it holds one frame and not four, so that it differs from the others in a clip
    that stands still, too. Even so a still clip has more than 0, by what the VAE makes of it.
    """
    if x.shape[2] < 2:
        return torch.zeros(len(x))
    x = (x[:, :, 1:] if x.shape[2] > 2 else x).float()
    over_time = x.var(dim=2, correction=0).flatten(1).mean(1)
    return (over_time / x.flatten(2).var(dim=2, correction=0).mean(1).clamp(min=1e-12)).sqrt().cpu()


def guarded(distance: float, share: float) -> float:
    """A distance, times as much larger as the samples move less than the real ones. share: of their mean
    motion; above 1 it earns nothing.
    """
    return distance / min(1.0, max(LEAST_MOTION, share))
