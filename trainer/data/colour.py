"""HDR and wide-gamut video to what a BT.709 screen shows: closed forms of the standards and one tone map, in
numpy.

Codes of transfers and primaries are those of ITU-T H.273, which video files carry.
"""

import numpy as np

from apt_core.errors import AptError

WHITE = 203.0
"""cd/m2 of HDR's reference white (ITU-R BT.2408)."""
PEAK = 1000.0
"""cd/m2 of the screen that HLG is shown on here; what PQ has above it is white."""
KNEE = 0.5  # of SDR's white: below it the tone map changes nothing
GAMMA = 2.4  # of an SDR screen (ITU-R BT.1886)

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
    """Raises AptError for colours that nothing here converts. matrix: of luma and chroma, 0 for RGB."""
    tables = (REFUSED_TRANSFERS, transfer), (REFUSED_PRIMARIES, primaries), (REFUSED_MATRICES, matrix)
    if found := next((names[code] for names, code in tables if code in names), None):
        raise AptError(
            f"{path} has colours that cannot be converted ({found}): export it in BT.709, PQ or HLG."
        )


def conversion(transfer: int, primaries: int) -> str:
    """What `to_sdr` does to such a video, for people; "" for one that needs nothing."""
    if transfer in HDR:
        return f"tone mapped from {HDR[transfer]} to SDR in BT.709"
    return f"colours converted from {WIDE[primaries]} to BT.709" if primaries in WIDE else ""


def pq_light(signal: np.ndarray) -> np.ndarray:
    """PQ's signal in [0, 1] -> light in cd/m2, 0 to 10000 (the EOTF of SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """HLG's signal in [0, 1] -> light of the scene in [0, 1] (the inverse OETF of ITU-R BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def hlg_light(scene: np.ndarray) -> np.ndarray:
    """Light of the scene, [..., 3] in BT.2020 -> light in cd/m2 on a screen of PEAK (the OOTF of ITU-R
    BT.2100, gamma 1.2).
    """
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], scene.dtype)
    return PEAK * luminance[..., None] ** scene.dtype.type(0.2) * scene


def tone_map(light: np.ndarray) -> np.ndarray:
    """Light over the reference white, from 0 up -> [0, 1]: itself up to KNEE, then a hyperbola that leaves it
    smoothly and is 1 at PEAK.
    """
    top, over = PEAK / WHITE, np.minimum(light, PEAK / WHITE) - KNEE
    bend = 1 / (1 - KNEE) - 1 / (top - KNEE)
    return np.where(over <= 0, light, KNEE + over / (1 + bend * np.maximum(over, 0)))


def to_bt709(primaries: int) -> np.ndarray:
    """`[3, 3]`: linear RGB of these primaries -> linear RGB of BT.709. Both have the white D65."""
    return np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)


def _to_xyz(primaries: int) -> np.ndarray:
    x, y = np.array([*PRIMARIES[primaries], D65]).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])  # columns of luminance 1
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def to_sdr(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint16 `[H, W, 3]` as the file has them, full range -> uint8 `[H, W, 3]` of BT.709 for a screen of
    gamma 2.4.

    PQ and HLG are brought to light, to BT.709's primaries, and through `tone_map` by their largest channel,
    so that hues stay; other curves are taken for gamma 2.4. What BT.709 cannot show is clipped. Unknown
    primaries of HDR are BT.2020's.
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
