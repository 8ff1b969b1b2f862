"""SMPTE ST 2084 and BT.1886 from light to signal, for tests that make HDR files."""

import numpy as np


def pq_signal(light: float) -> float:
    """cd/m2 -> PQ's signal in [0, 1]."""
    y = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def code(light) -> np.ndarray:
    """Light in [0, 1] -> the 8 bits by which a screen of gamma 2.4 shows it."""
    return np.rint(255 * np.asarray(light) ** (1 / 2.4))
