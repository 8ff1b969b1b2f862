"""NOISE objects for stock nodes, in which every item of a batch has its own seed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..apt_core.method.noise import COMFYUI, draw, walk


class SeedNoise:
    """Item i of a batch is sample i of the seed, by one of the rules of apt_core.method.noise. With ComfyUI's
    rule this is seed + i, so that each item can be made again alone. Items that Latent From Batch cuts out
    keep their noise.
    """

    def __init__(self, seed: int, rule: str = COMFYUI):
        self.seed, self.rule = seed, rule

    def generate_noise(self, latent: dict, step: int = 0) -> Tensor:
        samples = latent["samples"]
        items = latent.get("batch_index") or range(len(samples))
        return torch.stack([draw(self.rule, self.seed, item, samples.shape[1:], step) for item in items])


class WalkNoise:
    """Goes from seed to seed in equal steps along the batch (5.7 in the paper); each item gets the noise at
    its place.

    The noise of a seed is ComfyUI's. For open and closed walks see apt_core.method.noise.walk.
    """

    def __init__(self, seeds: Sequence[int], closed: bool):
        self.seeds, self.closed, self.seed = seeds, closed, seeds[0]

    def generate_noise(self, latent: dict, step: int = 0) -> Tensor:
        samples = latent["samples"]
        stations = [draw(COMFYUI, seed, 0, samples.shape[1:], step) for seed in self.seeds]
        return torch.stack([walk(stations, item, len(samples), self.closed) for item in range(len(samples))])
