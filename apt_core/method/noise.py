"""The noise of a sample, by one of two rules, and walks through noise. The pipeline and the ComfyUI nodes
both call this module.

`apt`: each (seed, number) has its own random stream, so that no two samples share noise, whatever the batch
and the number of processes. This is the default of the pipeline and of `generate`. `comfyui`: what stock
ComfyUI draws for a seed; sample `number` uses seed + number, so sample 1 of seed 0 is sample 0 of seed 1.
This is the default of the node, which then gives the same result as stock KSampler.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AptError
from .flow import sample_noise

APT, COMFYUI = "apt", "comfyui"
NOISES = (APT, COMFYUI)


def draw(rule: str, seed: int, number: int, shape: Sequence[int], step: int = 0) -> Tensor:
    """Standard normal noise of `shape`, fp32 on the CPU, for sample `number` of a request with this seed.

    Step 0 is the noise that the sample starts from; steps 1, 2, ... are the noise that re-noising adds. With
    `comfyui`, step 0 equals comfy.sample.prepare_noise for one item: torch's CPU generator with the seed and
    one randn of the whole shape; the further steps continue the same generator.
    Raises AptError for a rule that is not in NOISES.
    """
    check_noise(rule)
    if rule == APT:
        return sample_noise([number], shape, seed, f"generate/step{step}" if step else "generate/z")[0]
    generator = torch.Generator().manual_seed((seed + number) % 2**64)
    for _ in range(step + 1):
        noise = torch.randn(tuple(shape), generator=generator)
    return noise


def walk(stations: Sequence[Tensor], item: int, items: int, closed: bool = False) -> Tensor:
    """Item `item` of `items` on the path through the stations, which are noises of one shape. The steps are
    equal (5.7), and a station itself is returned as it is.

    An open walk goes from the first station to the last. A closed one returns to the first station, but does
    not repeat it.
    """
    legs, steps = (len(stations), items) if closed else (len(stations) - 1, items - 1)
    station, rest = divmod(legs * item, max(steps, 1))
    if rest == 0:
        return stations[station]
    return slerp(stations[station], stations[(station + 1) % len(stations)], rest / steps)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at `share` (0 to 1) of the path from a to b, tensors of the same shape. Equal shares are
    equal angles, and the norm changes linearly from |a| to |b|.

    A straight path would leave the sphere on which normal noise lies: halfway its variance is one half. Where
    a and b point in the same or in opposite directions there is no unique arc, and the path is straight.
    """
    x, y = a.double(), b.double()
    norm_a, norm_b = x.norm(), y.norm()
    cosine = (x * y).sum() / (norm_a * norm_b)
    angle = math.acos(min(max(float(cosine), -1.0), 1.0))
    if not math.sin(angle) > 1e-6:
        return torch.lerp(a, b, share)
    norm = torch.lerp(norm_a, norm_b, share)
    mixed = math.sin((1 - share) * angle) * x / norm_a + math.sin(share * angle) * y / norm_b
    return (mixed * (norm / math.sin(angle))).to(a.dtype)


def check_noise(rule: str) -> None:
    """Raise AptError for a rule that is not in NOISES."""
    if rule not in NOISES:
        raise AptError(f"noise {rule!r} is not known: use {' or '.join(NOISES)}.")
