"""Whether a folder holds this very run: the settings that it stores, compared with those of now."""

from collections.abc import Mapping
from pathlib import Path

from apt_core.errors import AptError, and_more

SAYS = {"run": "holds a run with another", "ablation": "holds an ablation with another"}


def differing(stored: Mapping, now: Mapping) -> list[str]:
    """The names in `now` with another value than in `stored`, where a missing one counts as None. Sorted."""
    return sorted(name for name in now if stored.get(name) != now[name])


def refuse_another(folder: Path, kind: str, stored: Mapping, now: Mapping, or_else: str = "") -> None:
    """Raise AptError if `folder` holds a run with other settings. The message has the first of them, with its
    values unless they are tables.

    kind: "run" or "ablation"; or_else: what else would do than another folder or the same settings.
    """
    if not (changed := differing(stored, now)):
        return
    old, new = stored.get(changed[0]), now[changed[0]]
    values = "" if isinstance(old, Mapping) or isinstance(new, Mapping) else f" ({old!r}, now {new!r})"
    raise AptError(
        f"{folder} {SAYS[kind]} {and_more(changed)}{values}: give another --out, "
        f"or the settings of that {kind}{or_else and f', or {or_else}'}."
    )
