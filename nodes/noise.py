"""NOISE objects, as stock nodes take them, in which every item of a batch has a seed of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..apt_core.noise import COMFYUI, draw


class SeedNoise:
    """Item i of a batch is sample i of the seed, by one of the rules of apt_core.noise; by ComfyUI's that is seed + i, so that each can be made
    again alone. Items cut out by Latent From Batch keep theirs."""

    def __init__(self, seed: int, rule: str = COMFYUI):
        self.seed, self.rule = seed, rule

    def generate_noise(self, latent: dict, step: int = 0) -> Tensor:
        samples = latent["samples"]
        items = latent.get("batch_index") or range(len(samples))
        return torch.stack([draw(self.rule, self.seed, item, samples.shape[1:], step) for item in items])


class WalkNoise:
    """The batch walks from seed to seed in equal steps (the paper's 5.7), each item the noise of its place on the way.

    The noise of a seed is ComfyUI's. An open walk begins at the first seed and ends at the last; a closed one comes back to the first, which then is not repeated.
    """

    def __init__(self, seeds: Sequence[int], closed: bool):
        self.seeds, self.closed, self.seed = seeds, closed, seeds[0]

    def generate_noise(self, latent: dict, step: int = 0) -> Tensor:
        samples = latent["samples"]
        stations = [draw(COMFYUI, seed, 0, samples.shape[1:], step) for seed in self.seeds]
        return torch.stack([self._between(stations, item, len(samples)) for item in range(len(samples))])

    def _between(self, stations: list[Tensor], item: int, items: int) -> Tensor:
        legs, steps = (len(stations), items) if self.closed else (len(stations) - 1, items - 1)
        station, rest = divmod(legs * item, max(steps, 1))
        if rest == 0:
            return stations[station]
        angle = math.pi / 2 * rest / steps
        # Independent normal noises are orthogonal in the mean, so on a quarter circle between them the variance stays 1.
        return math.cos(angle) * stations[station] + math.sin(angle) * stations[(station + 1) % len(stations)]
