"""The noise of a sample, by either of two rules, and walks through it: the same calls for the pipeline and
for the ComfyUI nodes.

`apt`: a stream of its own for each (seed, number), so that no two samples share noise whatever the batch and
the number of processes. The default of pipeline and `generate`. `comfyui`: what stock ComfyUI makes of a
seed, for sample `number` of seed + number; sample 1 of seed 0 is sample 0 of seed 1. The default of the node,
which then equals stock KSampler.
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

    Step 0 is what the sample starts from, steps 1, 2, ... what re-noising adds. By `comfyui` step 0 equals
    comfy.sample.prepare_noise for one item: torch's CPU generator with the seed, one randn of the whole
    shape; each further step draws on from there.
    Raises AptError for a rule that is not one of NOISES.
    """
    check_noise(rule)
    if rule == APT:
        return sample_noise([number], shape, seed, f"generate/step{step}" if step else "generate/z")[0]
    generator = torch.Generator().manual_seed((seed + number) % 2**64)
    for _ in range(step + 1):
        noise = torch.randn(tuple(shape), generator=generator)
    return noise


def walk(stations: Sequence[Tensor], item: int, items: int, closed: bool = False) -> Tensor:
    """Place `item` of `items` on the way through the stations, noises of one shape, in equal steps (5.7). A
    station itself comes out as it is.

    An open walk begins at the first station and ends at the last; a closed one comes back to the first, which
    then is not repeated.
    """
    legs, steps = (len(stations), items) if closed else (len(stations) - 1, items - 1)
    station, rest = divmod(legs * item, max(steps, 1))
    if rest == 0:
        return stations[station]
    return slerp(stations[station], stations[(station + 1) % len(stations)], rest / steps)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point `share` (0 to 1) of the way from a to b, of any one shape: equal shares are equal angles, and
    the norm goes evenly from |a| to |b|.

    A straight way would leave the sphere on which normal noise lies: halfway its variance is a half. Where a
    and b point the same way, or opposite ways, there is no arc between them, and the way is straight.
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
    """Raises AptError for a rule that is not one of NOISES."""
    if rule not in NOISES:
        raise AptError(f"noise {rule!r} is not known: use {' or '.join(NOISES)}.")
