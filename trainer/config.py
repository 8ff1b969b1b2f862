"""Presets: TOML files with every setting of a training run, read into typed, frozen models.

`key=value` on the command line changes single settings.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from apt_core.errors import AptError
from trainer.overrides import apply, known_names, nearest
from trainer.settings import (
    Adversarial,
    Data,
    Distill,
    Files,
    Model,
    Phases,
    Sampling,
    Settings,
    Train,
)

__all__ = [
    "PRESETS",
    "Adversarial",
    "Data",
    "Distill",
    "Files",
    "Model",
    "Phases",
    "Preset",
    "Sampling",
    "Settings",
    "Train",
    "check_phase",
    "load_preset",
    "load_recipe",
]

PRESETS = Path(__file__).parent / "presets"


class Preset(Settings):
    """All settings of a run. `stage2` holds its recipes by name (`paper`, `stable`, ...); the first one is
    the default.
    """

    name: str
    model: Model
    files: Files = Files()
    data: Data
    sampling: Sampling
    distill: Distill
    train: Train = Train()
    stage2: dict[str, Phases] = Field(min_length=1)

    @property
    def default_recipe(self) -> str:
        return next(iter(self.stage2))

    def phases(self, recipe: str | None = None) -> Phases:
        """The two phases of a recipe. Raises AptError for a name that the preset does not have."""
        recipe = recipe or self.default_recipe
        if recipe not in self.stage2:
            raise AptError(
                f"preset {self.name} has no recipe {recipe!r}: use one of {', '.join(self.stage2)}."
            )
        return self.stage2[recipe]

    def phase(self, name: str, recipe: str | None = None) -> Adversarial:
        """The settings of stage 2's phase "image" or "video". Raises AptError as `phases` does."""
        return getattr(self.phases(recipe), name)

    def with_recipe(
        self, recipe: str, overrides: Sequence[str] = (), sections: Sequence[str] = ()
    ) -> "Preset":
        """The preset with the changes that a recipe makes to settings outside stage 2.

        `overrides` (see `load_preset`) win over the recipe's changes. Raises AptError as `phases` does, and
        for an unknown setting.
        """
        return self.changed(self.phases(recipe).also, recipe, overrides, sections)

    def changed(
        self,
        changes: Mapping[str, Any],
        recipe: str,
        overrides: Sequence[str] = (),
        sections: Sequence[str] = (),
    ) -> "Preset":
        """The preset with `changes` (settings by full name) applied; otherwise as `with_recipe`."""
        values = self.model_dump()
        for name, value in changes.items():
            section, _, key = name.partition(".")
            if not isinstance(values.get(section), dict) or key not in values[section]:
                raise AptError(
                    f"preset {self.name}: {recipe} changes {name}, but no setting has that "
                    f"name{nearest(name, known_names(Preset, values))}: correct it."
                )
            values[section][key] = value
        values = apply(values, overrides, known_names(Preset, values), sections)
        try:
            return Preset.model_validate(values)
        except ValidationError as error:
            raise _sentence(f"{self.name}, recipe {recipe}", error.errors()[0], values) from None


def load_preset(name: str | Path, overrides: Sequence[str] = (), sections: Sequence[str] = ()) -> Preset:
    """Load a preset by name (`mini`) or from a TOML file, with `key=value` overrides.

    A key is a full name (`distill.updates`) or just its last part, which is then looked up in `sections`, in
    that order.
    Raises AptError for an unknown preset or key (and suggests the nearest ones), and for an invalid value.
    """
    path = Path(name) if str(name).endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = [p.stem for p in sorted(PRESETS.glob("*.toml"))]
        raise AptError(
            f"there is no preset {str(name)!r}{nearest(str(name), known)}; "
            f"use one of {', '.join(known)}, or the path of a .toml file."
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return Preset.model_validate(apply(values, overrides, known_names(Preset, values), sections))
    except (OSError, UnicodeDecodeError):
        raise AptError(
            f"preset {path.name} cannot be read: give a TOML file in UTF-8 that you may read."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise AptError(f"preset {path.name} is not valid TOML ({error}): correct it.") from None
    except ValidationError as error:
        raise _sentence(path.name, error.errors()[0], values) from None


def load_recipe(
    name: str | Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] = (),
    phase: str | None = None,
) -> tuple[Preset, str]:
    """A preset as a run has it: as one of its recipes changes it, by default its first, and then `overrides`.

    phase: "image" or "video", in whose settings of the recipe a key is looked up before the other `sections`.
    Returns the recipe's name too. Raises AptError as `check_phase`, `load_preset` and `with_recipe` do.
    """
    if phase is not None:
        check_phase(phase)
    preset = load_preset(name)
    recipe = recipe or preset.default_recipe
    first = (f"stage2.{recipe}.{phase}",) if phase else ()
    return preset.with_recipe(recipe, overrides, (*first, *sections)), recipe


def check_phase(phase: str) -> None:
    """Raise AptError if this is no phase of stage 2."""
    if phase not in ("image", "video"):
        raise AptError(f"--phase {phase} is not known: use image or video.")


def comparable(preset: Mapping, recipe: str) -> dict:
    """A preset that a run has stored, in a form to compare with others.

    Settings that an earlier version did not have are filled in, and recipes other than the run's are left
    out. Raises pydantic's ValidationError (a ValueError) for a preset that does not fit this version.
    """
    whole = Preset.model_validate(preset).model_dump(mode="json")
    return whole | {"stage2": {name: one for name, one in whole["stage2"].items() if name == recipe}}


def _sentence(file: str, first: dict, values: dict) -> AptError:
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return AptError(f"preset {file}: {where} is missing: add it.")
    if first["type"] == "extra_forbidden":
        return AptError(
            f"preset {file}: there is no setting {where}{nearest(where, known_names(Preset, values))}: "
            "correct or remove it."
        )
    message = first["msg"].removeprefix("Value error, ").lower()  # how pydantic begins our own sentences
    return AptError(f"preset {file}: {where} is {first.get('input')!r}: {message}.")
