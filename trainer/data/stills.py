"""Convert any picture that Pillow opens to what a screen shows: 8-bit RGB in sRGB, over white."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from apt_core.errors import AptError
from trainer.data.colour import HDR

Note = Callable[[str], None]
"""A function that is called with a few words on each conversion of a file."""
OVER_WHITE = "transparent parts laid over white"
MIB = 2**20
# Pillow's own limits (1 and 64 MiB) are too low for printers' ICC profiles and the graphs ComfyUI writes.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * MIB
PngImagePlugin.MAX_TEXT_MEMORY = 256 * MIB
BLACK_POINT_COMPENSATION = 0x2000  # lcms2's flag
SAME = 2  # of 255: a profile that changes no colour by more than this is treated as sRGB
FIELDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}  # TIFF's SampleFormat


def silent(what: str) -> None:
    """A Note that ignores what it is told."""


def plain(path: str | Path, image: Image.Image, note: Note = silent, form: str | None = None) -> Image.Image:
    """Convert an open picture to 8-bit RGB in sRGB, with transparent parts laid over white.

    An ICC profile is converted to sRGB. Pixels of 16 bits, and floats from 0 (black) to 1 (white), become 8
    bits. form: the file's format ("PNG", "TIFF", ...), by default the image's own.
    Raises AptError for floats outside 0 to 1, for integers whose white level is unknown, and for a PNG in PQ
    or HLG.
    """
    profile, grey, form = (
        image.info.get("icc_profile"),
        image.mode in ("1", "L", "LA", "La"),
        form or image.format,
    )
    opacity = None
    if form == "PNG":
        refuse_hdr_png(path)
    if image.mode == "F" or image.mode.startswith("I"):
        image, opacity = _eight_bits(path, image, form, note)
        grey = True
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        opacity, image = image.getchannel("A"), image.convert("RGB")
    elif image.mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        note("colours converted from LAB to sRGB")
        profile = None
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        image = _to_srgb(image.convert("L") if grey else image, profile, note)
    return over_white(image.convert("RGB"), opacity, note)


def over_white(image: Image.Image, opacity: Image.Image | None, note: Note = silent) -> Image.Image:
    """Lay an RGB picture over white. opacity: mode L, 255 is opaque; None means opaque everywhere."""
    if opacity is None or opacity.getextrema()[0] == 255:
        return image
    note(OVER_WHITE)
    image = image.copy()
    image.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def why_unknown(path: str | Path) -> str | None:
    """Describe the pixels of a TIFF that Pillow cannot open; None if it is damaged or not a TIFF."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start[2] == 43 or start[3] == 43:  # BigTIFF
                start += file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(start)
            file.seek(tags.next)
            tags.load(file)
        bits, kind = tags[258][0], tags.get(339, (1,))[0]
        return f"{tags.get(277, 1)} channels of {bits}-bit {FIELDS[kind]}"
    except Exception:  # a damaged file can make Pillow raise almost anything
        return None


def refuse_hdr_png(path: str | Path) -> None:
    """Raise AptError for a PNG whose cICP chunk says PQ or HLG; Pillow ignores that chunk."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP":
                transfer = (file.read(2) + bytes(2))[1]
                if transfer in HDR:
                    raise AptError(
                        f"{path} is an HDR picture ({HDR[transfer]}), which is not converted: "
                        "save it in sRGB."
                    )
                return
            file.seek(size + 4, 1)


def _eight_bits(
    path, image: Image.Image, form: str | None, note: Note
) -> tuple[Image.Image, Image.Image | None]:
    """Convert a picture of floats or of more than 8 bits to mode L; also returns its opacity, or None."""
    pixels = np.asarray(image)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not (0 <= low and high <= 1):  # written so that NaN is refused too
            raise AptError(
                f"{path} has float pixels from {low:g} to {high:g}, but only 0 "
                "(black) to 1 (white) is known: "
                "save it in 8 or 16 bits."
            )
        note("float pixels of 0 to 1 taken as black to white")
        return Image.fromarray(np.rint(pixels * 255).astype(np.uint8)), None
    if image.mode == "I" and form != "PNG":  # older Pillows open a 16-bit PNG in mode I
        raise AptError(
            f"{path} has signed or 32-bit integer pixels, and nothing says which value is white: "
            "save it in 8 or 16 bits."
        )
    clear = image.info.get("transparency")
    opacity = None if clear is None else Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8))
    return Image.fromarray((pixels.astype(np.uint16) >> 8).astype(np.uint8)), opacity


def _to_srgb(image: Image.Image, profile: bytes, note: Note) -> Image.Image:
    """Convert a picture in mode L, RGB or CMYK to sRGB by its profile.

    It stays as it is if the profile is sRGB already or cannot be used.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space, name = source.profile.xcolor_space.strip(), ImageCms.getProfileDescription(source).strip()
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if image.mode != {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space):
            raise ImageCms.PyCMSError(f"it is for {space}")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        srgb = ImageCms.createProfile("sRGB")
        change = ImageCms.buildTransform(source, srgb, image.mode, "RGB", intent, BLACK_POINT_COMPENSATION)
        if image.mode != "CMYK":
            probe = _colours(image.mode)
            moved = np.asarray(ImageCms.applyTransform(probe, change)).astype(int) - np.asarray(
                probe.convert("RGB")
            )
            if np.abs(moved).max() <= SAME:
                return image
        image = ImageCms.applyTransform(image, change)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        note(f"its colour profile ignored ({' '.join(str(error).split()).rstrip('.')})")
        return image
    note(f"colours converted from {name or 'its profile'} to sRGB")
    return image


def _colours(mode: str) -> Image.Image:
    """A picture of all 256 greys (mode "L"), or of a 17 x 17 x 17 grid of colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.rint(np.linspace(0, 255, 17)).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(17, -1, 3))
