"""The times of re-noising (3.5), in plain Python, so that any module may import it.

The pipeline, `generate`, the ComfyUI node and the miniature's evaluation all call it.
"""

from ..errors import AptError
from ..files.contract import SECOND_TIME


def step_times(steps: int, second: float = SECOND_TIME) -> tuple[float, ...]:
    """The times at which a sampler of `steps` calls evaluates the network: the first is 1, they decrease and
    stay above 0.

    They are the evenly spaced times `u = 1 - i / steps` under the shift of eq. 7 with `s = second / (1 -
    second)`, which moves 1/2 to `second`:
    exactly (1, second) for two steps; with 0.7 (1, 0.824, 0.538) for three. Raises AptError for fewer than 1
    step.
    """
    if steps < 1:
        raise AptError(f"the sampler needs at least 1 step, got {steps}.")
    even = [1 - i / steps for i in range(steps)]
    # s u / (s u + (1 - u)) with numerator and denominator times (1 - second), so that u = 1/2 gives `second`
    # to the last bit.
    return tuple(second * u / (second * u + (1 - second) * (1 - u)) for u in even)
