"""Pictures with colour profiles, floats, many bits and long texts: the values that a screen shows, or a
refusal by name.
"""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from apt_core.errors import AptError
from trainer.data import stills
from trainer.data.media import check_image, read_image

# Colourants as ICC profiles hold them, adapted to D50: red, green, blue.
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]).T
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]).T
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]).T
COLOURS = np.uint8([[200, 40, 40], [60, 120, 70], [90, 90, 200], [128, 128, 128], [150, 130, 120]])


def profile(name: str, gamma: float, colourants: np.ndarray | None) -> bytes:
    """An ICC profile of version 2: of RGB with a matrix, or without colourants of grey."""
    fixed = lambda value: struct.pack(">i", round(value * 65536))
    xyz = lambda values: b"XYZ \0\0\0\0" + b"".join(map(fixed, values))
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": xyz((0.9642, 1, 0.8249)),
    }
    if colourants is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {b"%cXYZ" % c: xyz(column) for c, column in zip(b"rgb", colourants.T)} | {
            b"%cTRC" % c: curve for c in b"rgb"
        }
    table, data, place = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", place + len(data), len(content))
        data += content
    space = b"GRAY" if colourants is None else b"RGB "
    head = (
        bytes(4) + bytes(4) + struct.pack(">I", 0x02200000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    )
    head = head.ljust(68, b"\0") + b"".join(map(fixed, (0.9642, 1, 0.8249)))
    whole = head.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def read(path, height, width):
    notes: list[str] = []
    check_image(path)
    return read_image(path, height, width, note=notes.append)[0], notes


def refused(path, *parts):
    for look in (lambda: check_image(path), lambda: read_image(path, 8, 8)):
        with pytest.raises(AptError) as error:
            look()
        text = str(error.value)
        assert (
            "\n" not in text and text.endswith(".") and all(part in text for part in (str(path), *parts))
        ), text
        assert "download it again" not in text  # it is not damaged


@pytest.mark.parametrize("name, colourants", [("Display P3", P3), ("Adobe RGB (1998)", ADOBE)])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_wide_gamuts_become_srgb(tmp_path, name, colourants, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(COLOURS[None]).save(
        tmp_path / f"a.{suffix}", icc_profile=profile(name, 2.2, colourants), **options
    )
    got, notes = read(tmp_path / f"a.{suffix}", 1, 5)
    expected = srgb((COLOURS / 255.0) ** 2.2 @ (np.linalg.inv(SRGB) @ colourants).T)
    assert np.abs(got[0] - expected).max() <= 1.5 and np.abs(COLOURS - expected).max() > 20
    assert notes == [f"colours converted from {name} to sRGB"]


def test_a_profile_that_is_srgb_changes_nothing(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(COLOURS[None]).save(tmp_path / "a.png", icc_profile=icc)
    got, notes = read(tmp_path / "a.png", 1, 5)
    assert np.array_equal(got[0], COLOURS) and notes == []


def test_profiles_of_grey_and_with_alpha(tmp_path):
    grey = np.arange(0, 256, 51, dtype=np.uint8)[None]
    linear = srgb(grey / 255.0)
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=profile("Linear Grey", 1.0, None))
    got, notes = read(tmp_path / "grey.png", 1, 6)
    assert np.abs(got[..., 0] - linear).max() <= 1 and notes == ["colours converted from Linear Grey to sRGB"]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", icc_profile=profile("Linear Grey", 1.0, None))
    assert np.abs(read(tmp_path / "deep.png", 1, 6)[0][..., 0] - linear).max() <= 1

    clear = np.uint8([255, 255, 255, 0, 0, 51])[None]
    Image.merge("LA", (Image.fromarray(grey), Image.fromarray(clear))).save(
        tmp_path / "la.png", icc_profile=profile("Linear Grey", 1.0, None)
    )
    got, notes = read(tmp_path / "la.png", 1, 6)
    assert np.abs(got[0, :, 1] - [*linear[0, :3], 255, 255, 255]).max() <= 1
    assert notes == ["colours converted from Linear Grey to sRGB", "transparent parts laid over white"]

    rgba = np.concatenate([COLOURS, np.uint8([[255], [0], [255], [255], [255]])], 1)
    Image.fromarray(rgba[None]).save(tmp_path / "rgba.png", icc_profile=profile("Display P3", 2.2, P3))
    got, _ = read(tmp_path / "rgba.png", 1, 5)
    expected = srgb((COLOURS / 255.0) ** 2.2 @ (np.linalg.inv(SRGB) @ P3).T)
    expected[1] = 255
    assert np.abs(got[0] - expected).max() <= 1.5


def test_a_grey_picture_with_a_profile_of_rgb_and_one_that_is_broken(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png", icc_profile=profile("Display P3", 2.2, P3))
    assert np.abs(read(tmp_path / "grey.png", 8, 8)[0] - srgb(np.array((100 / 255) ** 2.2))).max() <= 1.5
    for name, icc in (("broken", b"no profile at all"), ("other", profile("Linear Grey", 1.0, None))):
        Image.fromarray(COLOURS[None]).save(tmp_path / f"{name}.png", icc_profile=icc)
        got, notes = read(tmp_path / f"{name}.png", 1, 5)
        assert (
            np.array_equal(got[0], COLOURS)
            and len(notes) == 1
            and notes[0].startswith("its colour profile ignored (")
        ), notes


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(path, kind: bytes, content: bytes) -> None:
    """Puts a chunk behind a PNG's header."""
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk(kind, content) + whole[33:])


def test_a_png_with_a_long_text_or_profile_is_read(tmp_path):
    Image.fromarray(COLOURS[None]).save(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 * 2**20)))
    with_chunk(tmp_path / "a.png", b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"a" * 5 * 2**20))
    with_chunk(
        tmp_path / "a.png",
        b"iCCP",
        b"P3\0\0" + zlib.compress(profile("Display P3", 2.2, P3) + bytes(2 * 2**20)),
    )
    got, notes = read(tmp_path / "a.png", 1, 5)
    assert got.shape == (1, 5, 3) and len(notes) == 1
    Image.fromarray(COLOURS[None]).save(tmp_path / "b.png")
    with_chunk(
        tmp_path / "b.png", b"zTXt", b"workflow\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 2))
    )
    refused(
        tmp_path / "b.png",
        "has a text or a colour profile of more than 64 MiB, or 256 MiB in all: save it without.",
    )


def test_a_png_in_hdr_is_refused(tmp_path):
    Image.fromarray(COLOURS[None]).save(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", b"cICP", bytes([9, 16, 0, 1]))
    refused(tmp_path / "a.png", "is an HDR picture (PQ), which is not converted: save it in sRGB.")
    Image.fromarray(COLOURS[None]).save(tmp_path / "b.png")
    with_chunk(tmp_path / "b.png", b"cICP", bytes([1, 13, 0, 1]))
    assert np.array_equal(read(tmp_path / "b.png", 1, 5)[0][0], COLOURS)


def test_floats_of_0_to_1_are_black_to_white_and_others_refused(tmp_path):
    values = np.float32([[0, 0.2, 0.5, 1]])
    Image.fromarray(values).save(tmp_path / "a.tif")
    got, notes = read(tmp_path / "a.tif", 1, 4)
    assert got[0, :, 0].tolist() == [0, 51, 128, 255] and notes == [
        "float pixels of 0 to 1 taken as black to white"
    ]
    for name, odd, says in (
        ("wide", [0, 255], "from 0 to 255"),
        ("below", [-0.5, 1], "from -0.5 to 1"),
        ("nan", [0, np.nan], "from nan to nan"),
    ):
        Image.fromarray(np.float32([odd])).save(tmp_path / f"{name}.tif")
        refused(
            tmp_path / f"{name}.tif",
            f"has float pixels {says}, but only 0 (black) to 1 (white) is known: save it in 8 or 16 bits.",
        )


def test_integers_of_32_bits_are_refused_and_16_are_right(tmp_path):
    Image.fromarray(np.int32([[0, 70000]])).save(tmp_path / "a.tif")
    refused(
        tmp_path / "a.tif",
        "has signed or 32-bit integer pixels, and nothing says which value is white: "
        "save it in 8 or 16 bits.",
    )
    Image.fromarray(np.uint16([[0, 128 * 256, 65535]])).save(tmp_path / "b.tif")
    got, notes = read(tmp_path / "b.tif", 1, 3)
    assert got[0, :, 0].tolist() == [0, 128, 255] and notes == []


def tiff(width: int, bits: int, kind: int, channels: int) -> bytes:
    """A TIFF of one row, all zeros. kind: 1 unsigned, 2 signed, 3 float."""
    many = [(258, 3, channels, 200), (339, 3, channels, 220)]  # they lie at 200 and 220
    one = [
        (256, 4, 1, width),
        (257, 4, 1, 1),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 300),
        (277, 3, 1, channels),
        (278, 4, 1, 1),
        (279, 4, 1, width * channels * bits // 8),
    ]
    entries = sorted(one + many)
    head = (
        b"II*\0"
        + struct.pack("<IH", 8, len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
    )
    body = head.ljust(200, b"\0") + struct.pack(f"<{channels}H", *[bits] * channels)
    return (body.ljust(220, b"\0") + struct.pack(f"<{channels}H", *[kind] * channels)).ljust(
        300, b"\0"
    ) + bytes(width * channels * bits // 8)


def test_a_tiff_that_pillow_does_not_know_is_named_for_what_it_is(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(8, 32, 3, 3))
    refused(
        tmp_path / "a.tif", "has 3 channels of 32-bit floats, which cannot be read: save it in 8 or 16 bits."
    )
    (tmp_path / "b.tif").write_bytes(tiff(8, 8, 1, 3))
    assert (read(tmp_path / "b.tif", 1, 8)[0] == 0).all()
    (tmp_path / "c.tif").write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(AptError, match="c.tif cannot be read as an image"):
        check_image(tmp_path / "c.tif")


def test_transparency_of_16_bits_and_of_palettes_lies_over_white(tmp_path):
    image = Image.fromarray(np.uint16([[0, 300, 30000]]))
    image.save(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", b"tRNS", struct.pack(">H", 300))
    got, notes = read(tmp_path / "a.png", 1, 3)
    assert got[0, :, 0].tolist() == [0, 255, 30000 >> 8] and notes == ["transparent parts laid over white"]
    palette = Image.fromarray(np.uint8([[0, 1, 2]]), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "b.png", transparency=1)
    got, notes = read(tmp_path / "b.png", 1, 3)
    assert got[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]] and notes == [
        "transparent parts laid over white"
    ]


def test_lab_becomes_srgb(tmp_path):
    lab = ImageCms.profileToProfile(
        Image.fromarray(COLOURS[None]),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    lab.save(tmp_path / "a.tif")
    got, notes = read(tmp_path / "a.tif", 1, 5)
    assert np.abs(got[0].astype(int) - COLOURS).max() <= 4 and notes == ["colours converted from LAB to sRGB"]


def test_too_many_pixels_are_said_to_be(tmp_path, monkeypatch):
    Image.new("L", (3000, 1000)).save(tmp_path / "a.png")
    monkeypatch.setattr(stills.Image, "MAX_IMAGE_PIXELS", 10**6)
    refused(tmp_path / "a.png", "has more than the 2 million pixels that can be read: make it smaller.")
