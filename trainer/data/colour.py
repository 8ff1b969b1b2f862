"""Convert HDR and wide-gamut video to SDR in BT.709: the standards' formulas and one tone map, in numpy.

Transfers, primaries and matrices are given by their ITU-T H.273 codes, as video files store them.
"""

import numpy as np

from apt_core.errors import AptError

WHITE = 203.0
"""Luminance of HDR reference white in cd/m2 (ITU-R BT.2408)."""
PEAK = 1000.0
"""Peak luminance of the assumed HLG display in cd/m2. PQ light at or above it becomes white."""
KNEE = 0.5  # as a fraction of SDR white; the tone map leaves everything below it unchanged
GAMMA = 2.4  # of an SDR display (ITU-R BT.1886)

PQ, HLG = 16, 18
HDR = {PQ: "PQ", HLG: "HLG"}
BT709, BT2020, P3 = 1, 9, 12
D65 = (0.3127, 0.3290)
PRIMARIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
WIDE = {BT2020: "BT.2020", P3: "Display P3"}
REFUSED_TRANSFERS = {
    8: "linear light",
    9: "a logarithmic curve",
    10: "a logarithmic curve",
    17: "the curve of SMPTE ST 428",
}
REFUSED_PRIMARIES = {4: "BT.470 M", 8: "film", 10: "CIE XYZ", 11: "DCI-P3"}
REFUSED_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 of constant luminance",
    11: "Y'D'zD'x",
    12: "a matrix of its own primaries",
    13: "a matrix of its own primaries",
    14: "ICtCp",
    15: "IPT (Dolby Vision)",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}


def check_colours(path, transfer: int, primaries: int, matrix: int) -> None:
    """Raise AptError for colours that this module cannot convert. matrix: H.273's matrix code, 0 for RGB."""
    tables = (REFUSED_TRANSFERS, transfer), (REFUSED_PRIMARIES, primaries), (REFUSED_MATRICES, matrix)
    if found := next((names[code] for names, code in tables if code in names), None):
        raise AptError(
            f"{path} has colours that cannot be converted ({found}): export it in BT.709, PQ or HLG."
        )


def conversion(transfer: int, primaries: int) -> str:
    """Say in a few words what `to_sdr` does to such a video; "" if it needs no conversion."""
    if transfer in HDR:
        return f"tone mapped from {HDR[transfer]} to SDR in BT.709"
    return f"colours converted from {WIDE[primaries]} to BT.709" if primaries in WIDE else ""


def pq_light(signal: np.ndarray) -> np.ndarray:
    """PQ signal in [0, 1] -> display light in cd/m2, from 0 to 10000 (the EOTF of SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """HLG signal in [0, 1] -> scene light in [0, 1] (the inverse OETF of ITU-R BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def hlg_light(scene: np.ndarray) -> np.ndarray:
    """Scene light `[..., 3]` in BT.2020 -> display light in cd/m2 on a display whose peak is PEAK.

    This is the OOTF of ITU-R BT.2100 with gamma 1.2.
    """
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], scene.dtype)
    return PEAK * luminance[..., None] ** scene.dtype.type(0.2) * scene


def tone_map(light: np.ndarray) -> np.ndarray:
    """Light relative to reference white (0 and up) -> [0, 1].

    The identity up to KNEE; above it a hyperbola that continues it smoothly and reaches 1 at PEAK.
    """
    top, over = PEAK / WHITE, np.minimum(light, PEAK / WHITE) - KNEE
    bend = 1 / (1 - KNEE) - 1 / (top - KNEE)
    return np.where(over <= 0, light, KNEE + over / (1 + bend * np.maximum(over, 0)))


def to_bt709(primaries: int) -> np.ndarray:
    """Matrix `[3, 3]` from linear RGB in these primaries to linear RGB in BT.709; both have white D65."""
    return np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)


def _to_xyz(primaries: int) -> np.ndarray:
    x, y = np.array([*PRIMARIES[primaries], D65]).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])  # each column has luminance 1
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def to_sdr(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """The file's full-range RGB, uint16 `[H, W, 3]` -> SDR in BT.709 with gamma 2.4, uint8 `[H, W, 3]`.

    PQ and HLG are decoded to linear light, converted to BT.709's primaries and tone mapped by the largest
    channel, which keeps hues. Any other transfer is treated as gamma 2.4. Colours outside BT.709 are clipped.
    HDR with unknown primaries is taken to be BT.2020.
    """
    codes = np.arange(65536) / 65535
    if transfer == PQ:
        light = (pq_light(codes) / WHITE).astype(np.float32)[rgb]
    elif transfer == HLG:
        light = hlg_light(hlg_scene(codes).astype(np.float32)[rgb]) / np.float32(WHITE)
    else:
        light = (codes**GAMMA).astype(np.float32)[rgb]
    known = primaries if primaries in PRIMARIES else BT2020 if transfer in HDR else BT709
    light = np.maximum(light @ to_bt709(known).T.astype(np.float32), 0)
    if transfer in HDR:
        largest = light.max(-1, keepdims=True)
        light *= tone_map(largest) / np.maximum(largest, 1e-6)
    return np.rint(255 * np.minimum(light, 1) ** np.float32(1 / GAMMA)).astype(np.uint8)
