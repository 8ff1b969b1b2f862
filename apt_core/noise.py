"""The noise of a sample, by either of two rules: the same call for the pipeline and for the ComfyUI nodes.

`apt`: a stream of its own for each (seed, number), so that no two samples share noise whatever the batch and the number of processes. The
default of pipeline and `generate`. `comfyui`: what stock ComfyUI makes of a seed, for sample `number` of seed + number; sample 1 of seed 0
is sample 0 of seed 1. The default of the node, which then equals stock KSampler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import AptError
from .flow import sample_noise

APT, COMFYUI = "apt", "comfyui"
NOISES = (APT, COMFYUI)


def draw(rule: str, seed: int, number: int, shape: Sequence[int], step: int = 0) -> Tensor:
    """Standard normal noise of `shape`, fp32 on the CPU, for sample `number` of a request with this seed.

    Step 0 is what the sample starts from, steps 1, 2, ... what re-noising adds. By `comfyui` step 0 equals comfy.sample.prepare_noise
    for one item: torch's CPU generator with the seed, one randn of the whole shape; each further step draws on from there.
    Raises AptError for a rule that is not one of NOISES.
    """
    check_noise(rule)
    if rule == APT:
        return sample_noise([number], shape, seed, f"generate/step{step}" if step else "generate/z")[0]
    generator = torch.Generator().manual_seed((seed + number) % 2**64)
    for _ in range(step + 1):
        noise = torch.randn(tuple(shape), generator=generator)
    return noise


def check_noise(rule: str) -> None:
    """Raises AptError for a rule that is not one of NOISES."""
    if rule not in NOISES:
        raise AptError(f"noise {rule!r} is not known: use {' or '.join(NOISES)}.")
