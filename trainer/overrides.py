"""`key=value` on the command line: find the setting, read the value, and suggest names for a wrong key."""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import get_args, get_origin

from pydantic import BaseModel

from apt_core.errors import AptError


def apply(values: dict, overrides: Sequence[str], known: Sequence[str], sections: Sequence[str]) -> dict:
    """A copy of the nested dictionary `values` with all overrides applied.

    overrides: "key=value"; values are read as TOML, and anything that is not TOML is text.
    known: the full names of all settings; sections: where to look up a key without dots, in this order.
    Raises AptError for an override that is not `key=value`, and for an unknown key, with the nearest ones.
    """
    out = deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise AptError(f"{override!r} is not a setting: write key=value, for example updates=100.")
        *path, leaf = _full_name(key.strip(), known, sections).split(".")
        place = out
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = _value(text.strip())
    return out


def known_names(cls: type[BaseModel], values: dict, prefix: str = "") -> list[str]:
    """The full names of all settings in a settings class. Keys of its dictionaries are those in `values`."""
    names = []
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if get_origin(kind) is dict:
            inner = values.get(name) if isinstance(values.get(name), dict) else {}
            names += [
                key for part in inner for key in known_names(get_args(kind)[1], {}, f"{prefix}{name}.{part}.")
            ]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            names += known_names(kind, {}, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def plain(value) -> str:
    """A setting's value as text: lists with commas, true or false, and none if it is not set."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if value is None or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for a mistyped name, or "" if no name is close.

    If known names begin with it, all of them are given: wan2.1-1.3b is short for wan2.1-1.3b-480p rather than
    a typo of wan2.1-14b.
    """
    known = list(dict.fromkeys(known))
    longer = [other for other in known if len(name) > 2 and other.startswith(name)]
    found = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""


def _full_name(key: str, known: Sequence[str], sections: Sequence[str]) -> str:
    candidates = [key, *(f"{section}.{key}" for section in sections)]
    for name in candidates:
        if name in known:
            return name
    near = [
        name.removeprefix(f"{section}.")
        for section in sections
        for name in known
        if name.startswith(f"{section}.")
    ]
    raise AptError(
        f"there is no setting {key!r}{nearest(key, [*near, *known])}: `settings` lists all of them."
    )


def _value(text: str):
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
