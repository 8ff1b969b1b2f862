"""The history of a run: rows, and the stop at the first number that is not finite."""

import pytest
import torch

from apt_core.errors import AptError
from trainer.log import History


def test_rows_hold_plain_numbers():
    history = History()
    history.add({"d_loss": torch.tensor(1.5)})
    history.extend({"g_loss": torch.tensor(0.25)})
    history.add({"d_loss": torch.tensor(1.0)})
    assert history.rows() == [{"d_loss": 1.5, "g_loss": 0.25}, {"d_loss": 1.0}]
    assert history.last() == {"d_loss": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(value):
    history = History()
    history.add({"d_loss": torch.tensor(1.0)})
    with pytest.raises(AptError, match=r"d_loss became (nan|inf) in update 2"):
        history.add({"d_loss": torch.tensor(value)})
