"""What is measured of the machine."""

import subprocess
import sys

import torch

from trainer.machines.machine import matrix_peak

BUSY = "while True: pass"


def test_the_peak_of_a_cpu_is_the_same_beside_other_load():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = matrix_peak("cpu", torch.float32, 256)
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(3)]
        try:
            beside = [matrix_peak("cpu", torch.float32, 256) for _ in range(5)]
        finally:
            for other in others:
                other.kill()
                other.wait()
        assert torch.get_num_threads() == 2
        # By the clock on the wall it came out at a twentieth and less.
        assert max(beside) > alone / 3
        torch.set_num_threads(1)
        assert matrix_peak("cpu", torch.float32, 256) < 0.8 * alone
    finally:
        torch.set_num_threads(threads)
