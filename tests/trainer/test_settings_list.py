"""The list of all settings: none is missing or without a meaning, and values are those that a run gets."""

import pytest
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.config import Adversarial, Preset, load_preset
from trainer.overrides import known_names
from trainer.settings_list import SECTIONS, settings_list


def listed(lines: list[str]) -> dict[str, str]:
    """Full name -> the line that begins its entry."""
    found, section = {}, ""
    for line in lines:
        if line.startswith("["):
            section = line[1:].partition("]")[0]
        elif line.startswith("  ") and not line.startswith("   "):
            found[f"{section}.{line.split()[0]}"] = line
    return found


def test_every_setting_is_listed_with_its_meaning():
    preset = load_preset("mini")
    names = {
        name
        for name in known_names(Preset, preset.model_dump())
        if not name.endswith(".also") and name != "name" and not name.startswith("stage2.")
    }
    phases = {
        f"stage2.demo.{phase}.{name}" for phase in ("image", "video") for name in Adversarial.model_fields
    }
    assert listed(settings_list(preset)).keys() == names | phases
    for section in (*SECTIONS.values(), Adversarial):
        assert section.__doc__
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_values_are_the_defaults_or_the_presets():
    default, mini = listed(settings_list()), listed(settings_list(load_preset("mini")))
    assert default["data.height"].split()[1] == "required" and mini["data.height"].split()[1] == "48"
    assert default["data.held_out"].split()[1] == "64" and default["files.vae"].split()[1] == "none"
    assert mini["files.vae"].split()[1] == "mini"
    assert default["train.sync_every_microbatch"].split()[1] == "false"
    assert "stage2.RECIPE.PHASE.r1_weight" in default


def test_a_recipes_values_are_those_that_it_gives_elsewhere_too():
    def shown(*arguments: str) -> dict[str, str]:
        lines = CliRunner().invoke(app, ["settings", *arguments]).stdout.splitlines()
        return {name: line.split()[1] for name, line in listed(lines).items()}

    first, weekend = shown("wan2.2-5b"), shown("wan2.2-5b", "--recipe", "weekend")
    assert (first["train.mode"], weekend["train.mode"], weekend["data.frames"]) == ("full", "lora", "33")
    assert weekend["stage2.weekend.video.batch"] == "32" and "stage2.weekend.video.batch" not in first
    refused = CliRunner().invoke(app, ["settings", "--recipe", "weekend"])
    assert refused.exit_code == 2
    assert refused.stderr == (
        "error: --recipe weekend is one of a preset's: name the preset, or leave it out.\n"
    )


@pytest.mark.parametrize("width", [72, 100])
def test_no_line_is_wider_than_asked(width):
    assert max(map(len, settings_list(width=width))) <= width


def test_the_command_prints_it():
    shown = CliRunner().invoke(app, ["settings", "mini"])
    assert shown.exit_code == 0 and "[stage2.demo.image]" in shown.stdout
    assert "Learning rate of the generator." in shown.stdout
