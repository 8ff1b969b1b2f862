"""What `steps` means: the times of re-noising by value, and which files are sampled so."""

import subprocess
import sys
from pathlib import Path

import pytest

from apt_core.errors import AptError
from apt_core.files.contract import SECOND_TIME, is_few_step, second_time
from apt_core.method.flow import shift
from apt_core.method.steps import step_times


def test_times():
    assert step_times(1) == (1.0,)
    assert step_times(3) == pytest.approx((1.0, 14 / 17, 7 / 13), abs=1e-15)
    assert step_times(4) == pytest.approx((1.0, 0.875, 0.7, 0.4375), abs=1e-15)
    for second in (SECOND_TIME, 0.1, 1 / 3, 0.5, 0.95):
        assert step_times(2, second) == (1.0, second)  # to the last bit
        for steps in (3, 8, 25):
            assert step_times(steps, second) == pytest.approx(
                [shift(1 - i / steps, second / (1 - second)) for i in range(steps)], abs=1e-14
            )
    with pytest.raises(AptError, match=r"^the sampler needs at least 1 step, got 0\.$"):
        step_times(0)


def test_which_files_are_sampled_by_re_noising():
    assert (
        is_few_step({"kind": "generator", "phase": "video"})
        and is_few_step({"kind": "generator", "phase": "distilled"})
        and is_few_step({"kind": "lora"})
    )
    assert not is_few_step({"kind": "base"}) and not is_few_step({})


def test_the_second_time_of_a_file():
    assert second_time("a", {}) == 0.7 and second_time("a", {"second_time": 0.4}) == 0.4
    for value in (0, 1, 7, -0.5, float("nan"), "0.4", None, True):
        with pytest.raises(AptError) as error:
            second_time("a.safetensors", {"second_time": value})
        assert (
            str(error.value) == f"a.safetensors: its metadata entry `apt` has second_time {value!r}, "
            "not a number between 0 and 1: export the file again."
        )


def test_it_imports_nothing_slow():
    code = (
        "import sys, apt_core.method.steps; slow = {'torch', 'numpy', 'diffusers'} & set(sys.modules); "
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
