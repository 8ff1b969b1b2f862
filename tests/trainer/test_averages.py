"""A setting of the average changes the average: decays differ from the first update on, and the warm-up is
what it says.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.config import load_preset
from trainer.stages.averages import Averages


def averages_of(steps: int, decays, warmup: float) -> Averages:
    """Averages of one weight that is n after n updates."""
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.zero_()
    averages = Averages(SimpleNamespace(generator=network, reshard=lambda: None), decays, warmup)
    for n in range(1, steps + 1):
        with torch.no_grad():
            network.weight.fill_(n)
        averages.update()
    return averages


def by_hand(steps: int, decay: float, warmup: float) -> float:
    value = 0.0
    for n in range(1, steps + 1):
        d = min(decay, n / (n + warmup))
        value = d * value + (1 - d) * n
    return value


@pytest.mark.parametrize("recipe", ["paper", "stable"])
@pytest.mark.parametrize("phase", ["image", "video"])
def test_decays_differ_in_every_recipe_at_its_own_number_of_updates(recipe, phase):
    settings = getattr(load_preset("mini").phases(recipe), phase)
    decays = (settings.ema_decay, 0.9, 0.98, 0.99, 0.995)
    averages = averages_of(settings.updates, decays, settings.ema_warmup)
    for decay, ema in averages.emas.items():
        assert ema.shadow["weight"].item() == pytest.approx(
            by_hand(settings.updates, decay, settings.ema_warmup), rel=1e-4
        )
    values = sorted(ema.shadow["weight"].item() for ema in averages.emas.values())
    assert min(b - a for a, b in zip(values, values[1:])) > 0.01 * values[-1]


def test_a_warm_up_is_used_and_stands_in_the_average():
    plain, warm = averages_of(30, (0.98,), 0), averages_of(30, (0.98,), 10)
    assert plain.main.shadow["weight"].item() == pytest.approx(by_hand(30, 0.98, 0), rel=1e-5)
    assert warm.main.shadow["weight"].item() == pytest.approx(by_hand(30, 0.98, 10), rel=1e-5)
    assert warm.main.shadow["weight"].item() > 1.5 * plain.main.shadow["weight"].item()
