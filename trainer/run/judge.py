"""A cheap score of the current generator, defined for any model. It decides which training states to keep."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from trainer.data.batches import Batches
from trainer.data.sampling import EpochSampler
from trainer.machines.distributed import World

# of the real samples' motion: clips that stand still count as a hundred times as far away, not infinitely
LEAST_MOTION = 0.01


class LatentJudge:
    """The distance between real latents and one-step samples of their captions, in statistics of each sample.
    It is increased if the samples move less than the real clips, see `guarded`.

    count: how many samples of `kind` to compare (all, if there are fewer). The seed decides which ones, and
        their noise.

    All processes must call this together; they divide the samples, and all get the same numbers: `judged`,
    lower is better, and for clips `judged_motion`, their motion divided by that of the real clips. It costs
    one forward pass per sample. The numbers rank the states of one run; they mean nothing between models or
    data sets.
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
        """The statistics `[count, features]` of the latents of all processes, and their mean motion."""
        rows = [torch.cat([statistics(x), motion(x[None])]) for x in mine]
        found = self.world.gather_rows(torch.stack(rows), self.count)
        return found[:, :-1], float(found[:, -1].mean())


def statistics(x: Tensor) -> Tensor:
    """Four statistics of each channel of a latent `[C, F, h, w]`, as `[4 C]`: the mean, the standard
    deviation, and the root mean square of differences between neighbouring places (detail) and between
    neighbouring frames (motion; 0 for an image).
    """
    flat = x.flatten(1)
    space = (x.diff(dim=2).square().flatten(1).mean(1) + x.diff(dim=3).square().flatten(1).mean(1)).sqrt()
    motion = x.diff(dim=1).square().flatten(1).mean(1).sqrt() if x.shape[1] > 1 else torch.zeros_like(space)
    return torch.cat([flat.mean(1), flat.std(1), space, motion])


def distance(made: Tensor, real: Tensor) -> float:
    """Squared Frechet distance between Gaussians with independent features, each feature in units of its
    standard deviation over the real samples, averaged over features.

    made, real: `[n, features]`. With independent features few samples are enough. Samples that are all alike
    differ from real ones in their standard deviation.
    """
    made, real = made.double(), real.double()
    unit = real.std(0).clamp(min=1e-6) if len(real) > 1 else torch.ones_like(real[0])
    spread = (made.std(0) - real.std(0)).square() if len(real) > 1 else 0.0
    return float((((made.mean(0) - real.mean(0)).square() + spread) / unit.square()).mean())


def motion(x: Tensor) -> Tensor:
    """Dynamic degree of latents `[B, C, F, h, w]` without optical flow, as `[B]`: the standard deviation of a
    latent over time (root of the variance's mean), divided by that over the whole channel. 0 for images.

    It is `trainer.evaluate.metrics.motion` in latents, and like that does not depend on contrast. The first
    latent frame encodes one frame instead of four, so it differs from the others even in a still clip; it is
    only used if there are just two. A still clip has a little more than 0 all the same, because of the VAE.
    """
    if x.shape[2] < 2:
        return torch.zeros(len(x))
    x = (x[:, :, 1:] if x.shape[2] > 2 else x).float()
    over_time = x.var(dim=2, correction=0).flatten(1).mean(1)
    return (over_time / x.flatten(2).var(dim=2, correction=0).mean(1).clamp(min=1e-12)).sqrt().cpu()


def guarded(distance: float, share: float) -> float:
    """A distance, divided by `share`, the samples' mean motion relative to that of the real clips. A share
    above 1 counts as 1, so more motion than the real clips' does not lower the distance.
    """
    return distance / min(1.0, max(LEAST_MOTION, share))
