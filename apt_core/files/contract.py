"""What a checkpoint says of itself: the JSON object `apt` in its metadata. Names, defaults and checks of all
its entries.

`apt` is {format, kind, base, over, phase, timestep, second_time, vae, native, text_length, rank, updates,
ema, ...}. Plain Python, so that anything may import it. Pipeline, trainer, `inspect` and the ComfyUI nodes
all ask here.
"""

import json
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import cast

from ..errors import AptError
from .lora_keys import is_lora

FORMAT = 1
KINDS = ("generator", "base", "lora")
SECOND_TIME = 0.7
"""The second of the two times of two-step sampling (3.5) when a file does not name it. The paper does not
state the value that it uses.
"""
TEXT_LENGTH = 512
"""The rows of text that every released Wan was trained with."""
RELEASED = {
    16: {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
    48: {"width": 1280, "height": 704, "frames": 121, "fps": 24.0},
}
"""What Wan 2.1 and Wan 2.2 5B were released for, by latent channels."""
MAX_FPS = 1000


def is_few_step(apt: Mapping) -> bool:
    """Whether the file holds an APT or distilled generator, whole or as a LoRA. Such a model is sampled by
    re-noising and not by Euler steps.
    """
    return apt.get("kind") in ("generator", "lora")


def claims_lora(apt: Mapping) -> bool:
    """Whether the file says that it is a LoRA."""
    return apt.get("kind") == "lora"


def is_lora_file(apt: Mapping, keys: Iterable[str]) -> bool:
    """Whether a file is a LoRA: its `apt` object says so, or the names of its weights show it."""
    return claims_lora(apt) or is_lora(keys)


def is_distilled(apt: Mapping) -> bool:
    """Whether the generator or LoRA was only distilled (stage 1) and not trained adversarially."""
    return apt.get("phase") == "distilled"


def is_adversarial(apt: Mapping) -> bool:
    """Whether the generator was trained adversarially, and not only distilled."""
    return apt.get("kind") == "generator" and not is_distilled(apt)


def second_time(what: object, apt: Mapping) -> float:
    """The second time that a file names, or SECOND_TIME. Raises AptError, which begins with `what`, for a
    value that is not in (0, 1).
    """
    value = apt.get("second_time", SECOND_TIME)
    # To type checkers a Real has no order.
    if not isinstance(value, Real) or not 0 < cast(float, value) < 1:
        raise _wrong(what, "second_time", value, "not a number between 0 and 1")
    return float(value)


def native(what: object, apt: Mapping) -> dict | None:
    """The width and height in pixels, frames and fps that a file was trained for; None when it does not say.

    Raises AptError, which begins with `what`, for sizes that are not whole and positive, and for a rate that
    is not above 0 and at most MAX_FPS.
    """
    if apt.get("native") is None:
        return None
    sizes = apt["native"]
    counts = (
        [sizes.get(name) for name in ("width", "height", "frames")] if isinstance(sizes, Mapping) else [None]
    )
    fps = sizes.get("fps") if isinstance(sizes, Mapping) else None
    if not all(isinstance(count, int) and count > 0 for count in counts) or not (
        isinstance(fps, Real) and 0 < cast(float, fps) <= MAX_FPS
    ):
        raise _wrong(what, "native", sizes, "not width, height, frames and fps")
    return dict(sizes)


def released(channels: int) -> dict:
    """The sizes to use when a file does not say what it was trained for: those of the released Wan with so
    many latent channels, and of Wan 2.1 if there is none.
    """
    return dict(RELEASED.get(channels, RELEASED[16]))


def text_length(what: object, apt: Mapping) -> int | None:
    """The most rows of text that a file's model had in training; None when it does not say.

    Raises AptError, which begins with `what`, for a value that is not a whole number of at least 1.
    """
    value = apt.get("text_length")
    if value is not None and not (isinstance(value, int) and value > 0):
        raise _wrong(what, "text_length", value, "not a whole number from 1")
    return value


def check_sizes(what: object, apt: Mapping) -> None:
    """Raise AptError, which begins with `what`, for impossible entries native, text_length or second_time."""
    native(what, apt)
    text_length(what, apt)
    second_time(what, apt)


def check_apt(what: object, apt: Mapping) -> None:
    """Raise AptError for a newer format, an unknown kind and impossible values. An empty object, from a file
    of another program, passes.
    """
    if not apt:
        return
    if not isinstance(apt.get("format"), int) or apt["format"] < 1:
        raise _wrong(what, "format", apt.get("format"), "not a number from 1")
    if apt["format"] > FORMAT:
        raise AptError(
            f"{what} has format {apt['format']} of the checkpoint contract, "
            f"but this version only reads up to {FORMAT}: update ComfyUI-APT."
        )
    if apt.get("kind") not in KINDS:
        raise AptError(
            f"{what}: its metadata entry `apt` has kind {apt.get('kind')!r}: "
            f"it must be one of {', '.join(KINDS)}."
        )
    second_time(what, apt)


def as_lora(apt: Mapping, rank: int) -> dict:
    """The entries with those of a LoRA of this rank."""
    return {**apt, "kind": "lora", "rank": rank}


def as_whole(apt: Mapping) -> dict:
    """The entries of a LoRA after it was added to its base: a whole generator, which has no rank and is over
    nothing.
    """
    kept = {name: value for name, value in apt.items() if name not in ("rank", "over")}
    return kept | {"kind": "generator"}


def metadata_strings(path: str | Path, metadata: Mapping) -> dict[str, str]:
    """The metadata of a file to write: `apt` with its defaults filled in, and the `modelspec.*` entries
    unchanged.

    Raises AptError for values that are not JSON, and as `check_apt` does.
    """
    strings = {key: str(value) for key, value in metadata.items() if key.startswith("modelspec.")}
    own = {key: value for key, value in metadata.items() if key not in strings}
    apt = {"format": FORMAT, "kind": "generator", "timestep": 1000} | own
    try:
        text = json.dumps(apt, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AptError(
            f"{path}: the metadata cannot be written as JSON ({error}): "
            "use numbers, strings, lists and dictionaries."
        ) from None
    check_apt(path, apt)
    return strings | {"apt": text}


def read_apt(what: object, metadata: Mapping[str, str]) -> dict:
    """The `apt` object in the metadata of a safetensors file, or {} for a file of another program. Raises
    AptError as `check_apt` does.
    """
    apt = metadata_json(what, metadata, "apt")
    check_apt(what, apt)
    return apt


def metadata_json(what: object, metadata: Mapping[str, str], name: str) -> dict:
    """The JSON object under the metadata key `name`, or {} when there is none. Raises AptError when the value
    is not a JSON object.
    """
    try:
        value = json.loads(metadata.get(name, "{}"))
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise AptError(f"{what}: its metadata entry `{name}` is not a JSON object: export the file again.")
    return value


def _wrong(what: object, name: str, value: object, why: str) -> AptError:
    return AptError(f"{what}: its metadata entry `apt` has {name} {value!r}, {why}: export the file again.")
