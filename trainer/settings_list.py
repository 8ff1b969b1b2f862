"""All settings as a list for people: what each one means, and its default or a preset's value."""

import textwrap
from collections.abc import Iterator, Mapping

from trainer.config import Adversarial, Data, Distill, Files, Model, Preset, Sampling, Settings, Train
from trainer.overrides import plain

SECTIONS: Mapping[str, type[Settings]] = {
    "model": Model,
    "files": Files,
    "data": Data,
    "sampling": Sampling,
    "distill": Distill,
    "train": Train,
}
PHASE = "stage2.RECIPE.PHASE"
"""Takes the place of recipe and phase in the names of stage 2's settings when no preset is given."""


def settings_list(preset: Preset | None = None, recipe: str | None = None, width: int = 100) -> list[str]:
    """Lines of at most `width` characters that list all settings.

    Each section has its name and meaning, then each setting has its full name, value and meaning.

    preset: list this preset's values instead of the defaults, with the phases of `recipe`, by default its
    first. What a recipe changes elsewhere is shown if the preset has it applied (`load_recipe`).
    """
    lines = []
    for name, section, values in _sections(preset, recipe):
        about = " ".join((section.__doc__ or "").split())
        lines += ["", *textwrap.wrap(f"[{name}] {about}", width)]
        for key, field in section.model_fields.items():
            required = values is None and field.is_required()
            value = "required" if required else plain(values[key] if values else field.default)
            head = f"  {key:<22} {value:<14} "
            lines += textwrap.wrap(
                head + (field.description or ""), width, subsequent_indent=" " * 40, drop_whitespace=True
            )
    return lines[1:]


def _sections(preset: Preset | None, recipe: str | None) -> Iterator[tuple[str, type[Settings], dict | None]]:
    for name, section in SECTIONS.items():
        yield name, section, None if preset is None else getattr(preset, name).model_dump()
    if preset is None:
        yield PHASE, Adversarial, None
        return
    for phase in ("image", "video"):
        values = preset.phase(phase, recipe).model_dump()
        yield f"stage2.{recipe or preset.default_recipe}.{phase}", Adversarial, values
