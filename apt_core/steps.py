"""What `steps` means: which sampler a file is for, and the times of re-noising (3.5). Plain Python, so that anything may import it.

An APT or distilled file is sampled by re-noising (`generator.few_step`) at `step_times`; a base, and a file that says nothing of itself, by
Euler (`generator.euler_cfg`). Pipeline, `generate`, the ComfyUI node and the miniature's evaluation all ask here.
"""

from collections.abc import Mapping
from numbers import Real

from .errors import AptError

SECOND_TIME = 0.7
"""The second of the two times of two-step sampling, for files whose metadata does not name it. The paper does not print its own."""


def is_few_step(apt: Mapping) -> bool:
    """Whether the file with this `apt` object is an APT or distilled generator, whole or as a LoRA."""
    return apt.get("kind") in ("generator", "lora")


def second_time(what: object, apt: Mapping) -> float:
    """The second time that an `apt` object names, else SECOND_TIME. Raises AptError that begins with `what` for one that is not in (0, 1)."""
    value = apt.get("second_time", SECOND_TIME)
    if not isinstance(value, Real) or not 0 < value < 1:
        raise AptError(f"{what}: its metadata entry `apt` has second_time {value!r}, not a number between 0 and 1: export the file again.")
    return float(value)


def step_times(steps: int, second: float = SECOND_TIME) -> tuple[float, ...]:
    """The times of `steps` calls of the network by re-noising: the first 1, decreasing, above 0.

    Equally spaced times `u = 1 - i / steps` under the shift of eq. 7 with `s = second / (1 - second)`, the one that takes 1/2 to `second`:
    exactly (1, second) for two steps; with 0.7 (1, 0.824, 0.538) for three. Raises AptError for fewer than 1 step.
    """
    if steps < 1:
        raise AptError(f"the sampler needs at least 1 step, got {steps}.")
    even = [1 - i / steps for i in range(steps)]
    # s u / (s u + (1 - u)) times (1 - second) above and below, so that u = 1/2 gives `second` to the last bit.
    return tuple(second * u / (second * u + (1 - second) * (1 - u)) for u in even)
