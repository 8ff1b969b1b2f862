"""The times of re-noising (3.5). Plain Python, so that anything may import it.

Pipeline, `generate`, the ComfyUI node and the miniature's evaluation all ask here.
"""

from ..errors import AptError
from ..files.contract import SECOND_TIME


def step_times(steps: int, second: float = SECOND_TIME) -> tuple[float, ...]:
    """The times of `steps` calls of the network by re-noising: the first 1, decreasing, above 0.

    Equally spaced times `u = 1 - i / steps` under the shift of eq. 7 with `s = second / (1 - second)`, the
    one that takes 1/2 to `second`:
    exactly (1, second) for two steps; with 0.7 (1, 0.824, 0.538) for three. Raises AptError for fewer than 1
    step.
    """
    if steps < 1:
        raise AptError(f"the sampler needs at least 1 step, got {steps}.")
    even = [1 - i / steps for i in range(steps)]
    # s u / (s u + (1 - u)) times (1 - second) above and below, so that u = 1/2 gives `second` to the last
    # bit.
    return tuple(second * u / (second * u + (1 - second) * (1 - u)) for u in even)
