"""Which metrics are measured, and the networks that they need."""

from collections.abc import Sequence
from pathlib import Path

import torch

from apt_core.engine.request import Request
from apt_core.errors import AptError
from trainer.mini.clips import SIZE, is_drawn

from .efficientnet import efficientnet_lite0
from .features import Features, Network, network_tables, read_networks, read_tables
from .metrics import CLIP_SCORE, DISTANCES, FD, FLOW, FRECHET_LITE0, JUDGED, NAMES, can_be_judged
from .published import PATCH, files_of

TABLES = {FD: "features", CLIP_SCORE: "clip"}
"""The table of the file `--features` that a metric needs."""
OF_FILES = tuple(name for name in DISTANCES if name != FRECHET_LITE0)
"""The distances in the published files of weights that a user has to have."""
AGAINST_REAL = (FD, *DISTANCES)


def chosen(names: str | None, features: Path | None, usual: Sequence[str] = ()) -> list[str]:
    """The metrics in a comma-separated list. Without a list those in `usual`, a protocol's; without these all
    that are possible: `fd` and `clip_score` if the file `features` has their tables, `fd` standing for all
    distances of its networks, and not `frechet_efficientnet_lite0`, which takes 1,281 frames; `with_judge`
    adds the miniature's judge.

    Raises AptError for a name that is no metric, if a metric's table is missing, and if no table is used.
    """
    tables = read_tables(features) if features else {}
    if names is None and not usual:
        return [n for n in NAMES if n not in (*DISTANCES, *JUDGED) and TABLES.get(n, "") in ("", *tables)]
    given = usual if names is None else (name.strip() for name in names.split(","))
    wanted = list(dict.fromkeys(name for name in given if name))
    if FLOW in wanted and FLOW not in NAMES:
        raise AptError("flow needs OpenCV: pip install opencv-python-headless, or leave flow out.")
    if unknown := [name for name in wanted if name not in NAMES] or ([] if wanted else [names]):
        raise AptError(f"there is no metric {unknown[0]!r}: use some of {', '.join(NAMES)}.")
    networks = network_tables(features) if features else []
    for name in wanted:
        if name in OF_FILES and not any(name in network.names for network in networks):
            raise AptError(_missing(name, networks))
        table = TABLES.get(name)
        if table and table not in tables:
            head = f"[{table}]" if name == CLIP_SCORE else f"[[{table}]]"
            raise AptError(
                f"{name} needs --features FILE.toml with a {head} table, which says what network to use: add "
                f"it, or leave {name} out."
            )
    users = {"features": (FD, *OF_FILES), "clip": (CLIP_SCORE,)}
    if tables and not any(name in wanted for table in tables for name in users[table]):
        needed = " and ".join(name for name, table in TABLES.items() if table in tables)
        raise AptError(
            f"--features {features} is only used by {needed}: add that to --metrics, or leave the file out."
        )
    return wanted


def with_judge(names: list[str], captions: Sequence[str], request: Request, named: bool) -> list[str]:
    """The metrics, and the figures of the miniature's judge unless the metrics were `named` and where it can
    read the clips. Raises AptError if they are named and it cannot.
    """
    can = can_be_judged(captions, request.height, request.width)
    if not named:
        return [*names, *JUDGED] if can else names
    if not can and (wanted := next((name for name in names if name in JUDGED), None)):
        other = next((text for text in captions if not is_drawn(text)), None)
        why = f"{request.width}x{request.height}" if other is None else f"the prompt {other!r}"
        raise AptError(
            f"{wanted} is read by the miniature's judge, which knows drawn clips of {SIZE}x{SIZE} and their "
            f"captions only, not {why}: leave {wanted} out."
        )
    return names


def opened(names: Sequence[str], features: Path | None, device: torch.device) -> list[Features]:
    """The networks of the distances among these metrics, each with the distances that are wanted of it.
    Raises AptError if one cannot be opened.
    """
    found = []
    if features and any(name in names for name in (FD, *OF_FILES)):
        for network in read_networks(features):
            wanted = network.names if FD in names else [name for name in network.names if name in names]
            found += [Features(network, device, only=wanted)] if wanted else []
    return found + ([efficientnet_lite0(device)] if FRECHET_LITE0 in names else [])


def _missing(name: str, networks: Sequence[Network]) -> str:
    if there := next((n for n in networks if n.known and n.known.patch == name), None):
        return (
            f"{name} is of patches of {PATCH} pixels, but the table of {there.path.name} has patch = "
            f"{there.patch}: leave patch out there, or leave {name} out."
        )
    files = " or ".join(f"{file} (SHA-256 {digest})" for file, digest in files_of(name))
    return (
        f"{name} needs the weights that it is defined by, {files}: put that file somewhere and name it in a "
        f"[[features]] table of --features FILE.toml, with path and sha256, or leave {name} out."
    )
