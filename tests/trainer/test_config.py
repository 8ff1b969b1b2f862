"""Presets: every value typed, unknown names and bad values refused in one sentence."""

import pytest

from apt_core.errors import AptError
from apt_core.method.dmd import DmdSettings
from apt_core.method.objectives import Objective
from trainer.config import PRESETS, load_preset


def test_every_shipped_preset_loads():
    for path in PRESETS.glob("*.toml"):
        assert load_preset(path.stem).name == path.stem


def test_the_paper_recipe_keeps_the_papers_structure():
    phases = load_preset("mini").phases("paper")
    for phase in (phases.image, phases.video):
        objective = phase.objective()
        assert not objective.relativistic and objective.r1_weight == Objective.paper("image").r1_weight == 100
        assert objective.r2_weight == objective.centering == phase.warmup == 0 and objective.reg_fraction == 1
    assert (phases.image.shift, phases.video.shift) == (1, 12)


def test_the_stable_recipe_is_relativistic_with_both_penalties():
    for phase in (load_preset("mini").phases("stable").image, load_preset("mini").phases("stable").video):
        objective = phase.objective()
        assert (
            objective.relativistic
            and objective.r1_weight > 0
            and objective.r2_weight > 0
            and objective.centering == 0.01
        )


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(AptError, match="no preset 'nope'; use one of .*mini"):
        load_preset("nope")
    with pytest.raises(
        AptError, match=r"'wan2.1-1.3b' \(did you mean wan2.1-1.3b-480p or wan2.1-1.3b-720p\?\)"
    ):
        load_preset("wan2.1-1.3b")
    with pytest.raises(AptError, match="no recipe 'wild': use one of demo, proof, paper, stable, dmd"):
        load_preset("mini").phases("wild")


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("updates = 75", "image.updates is -3"),
        ("lr_generator = 1e-5", "image.lr_generator is -3"),
        ('negative_prompt = "blurry, broken, deformed, bad quality"', "negative_prompt is -3"),
    ],
)
def test_a_bad_value_is_named(tmp_path, line, complaint):
    text = (PRESETS / "mini.toml").read_text(encoding="utf-8")
    assert line in text
    bad = tmp_path / "bad.toml"
    bad.write_text(text.replace(line, line.split("=")[0] + "= -3", 1))
    with pytest.raises(AptError, match=complaint) as error:
        load_preset(bad)
    assert "\n" not in str(error.value) and "bad.toml" in str(error.value)


def test_a_misspelled_setting_is_an_error(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(
        (PRESETS / "mini.toml")
        .read_text(encoding="utf-8")
        .replace("[sampling]", "[sampling]\ngiudance = 2", 1)
    )
    with pytest.raises(AptError, match="giudance"):
        load_preset(bad)


def test_broken_toml_is_named(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("name = ")
    with pytest.raises(AptError, match="bad.toml is not valid TOML"):
        load_preset(bad)


def test_a_missing_value_and_a_file_that_is_no_text_are_named(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(
        (PRESETS / "mini.toml").read_text(encoding="utf-8").replace("second_time", "# second_time", 1)
    )
    with pytest.raises(AptError, match=r"^preset bad.toml: sampling.second_time is missing: add it.$"):
        load_preset(bad)
    bad.write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(AptError, match="preset bad.toml cannot be read: give a TOML file in UTF-8"):
        load_preset(bad)


SECTIONS = ("stage2.paper.image", "train", "files")


def test_overrides_change_single_numbers():
    changed = load_preset(
        "mini",
        ["updates=2", "mode=lora", "distill.lr=1e-3", "base=/models/wan", "ema_decays=[0.9, 0.99]"],
        SECTIONS,
    )
    assert (
        changed.phases("paper").image.updates == 2
        and changed.phases("paper").video.updates == load_preset("mini").phases("paper").video.updates
    )
    assert (
        changed.train.mode == "lora"
        and changed.distill.lr == 1e-3
        and changed.files.base == "/models/wan"
        and changed.train.ema_decays == (0.9, 0.99)
    )


@pytest.mark.parametrize(
    "override, sentence",
    [
        (
            "updtes=2",
            "there is no setting 'updtes' (did you mean updates?): `settings` lists all of them.",
        ),
        (
            "distill.update=3",
            (
                "there is no setting 'distill.update' (did you mean distill.updates?): "
                "`settings` lists all of them."
            ),
        ),
        (
            "stage2.wild.image.updates=3",
            (
                "there is no setting 'stage2.wild.image.updates' (did you mean stage2.dmd.image.updates?): "
                "`settings` lists all of them."
            ),
        ),
        ("updates", "'updates' is not a setting: write key=value, for example updates=100."),
        (
            "updates=-3",
            "preset mini.toml: stage2.paper.image.updates is -3: input should be greater than or equal to 1.",
        ),
        ("mode=half", "preset mini.toml: train.mode is 'half': input should be 'full' or 'lora'."),
    ],
)
def test_a_wrong_override_is_one_sentence(override, sentence):
    with pytest.raises(AptError) as error:
        load_preset("mini", [override], SECTIONS)
    assert str(error.value) == sentence


def test_a_misspelled_setting_in_a_file_names_the_right_one(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(
        (PRESETS / "mini.toml").read_text(encoding="utf-8").replace("guidance = 2.0", "giudance = 2.0", 1)
    )
    with pytest.raises(
        AptError,
        match=(
            r"(sampling.guidance is missing|there is no setting sampling.giudance \(did you mean"
            r" sampling.guidance\?\))"
        ),
    ):
        load_preset(bad)


def test_the_rate_of_stage_1_rises_and_falls():
    settings = load_preset("mini").distill.model_copy(
        update=dict(updates=100, lr=0.01, lr_end=0.002, lr_warmup=20)
    )
    assert settings.rate(0) == pytest.approx(0.01 / 20)
    assert settings.rate(9) == pytest.approx((0.01 - 0.008 * 0.09) / 2)
    assert settings.rate(50) == pytest.approx(0.006)
    assert settings.rate(99) == pytest.approx(0.01 - 0.008 * 0.99)
    assert settings.model_copy(update=dict(lr_end=None, lr_warmup=0)).rate(77) == 0.01


def test_the_fake_scores_rate_rises_and_falls_with_the_generators():
    settings = load_preset("mini").distill.model_copy(
        update=dict(updates=100, lr=0.01, lr_end=0.002, lr_warmup=20, lr_fake=0.03)
    )
    assert settings.rate_of_fake(50) == pytest.approx(0.018)
    assert settings.rate_of_fake(9) == pytest.approx(3 * settings.rate(9))
    assert settings.model_copy(update=dict(lr_fake=None)).rate_of_fake(9) == settings.rate(9)


def test_the_settings_of_dmd_reach_the_method():
    own = load_preset("mini", ["distill.guidance=4.0", "distill.t_min=0.3"]).distill
    assert own.method == "consistency"  # the paper's
    assert own.matching(1.5) == DmdSettings(0.3, 0.98, 1.5, 4.0, "dmd", 0.0)
    changes = ["t_max=0.7", "t_shift=5.0", "weighting=kl", "regression=0.25"]
    changed = load_preset("mini", [f"distill.{change}" for change in changes]).distill
    assert changed.matching(1.5) == DmdSettings(0.02, 0.7, 5.0, own.guidance / 2, "kl", 0.25)
    with pytest.raises(AptError) as error:
        load_preset("mini", ["distill.t_min=0.5", "distill.t_max=0.4"])
    assert str(error.value) == "preset mini.toml: distill.t_max is 0.4: it must not be below t_min, 0.5."
    with pytest.raises(AptError, match="distill.t_max is 0.98: it must not be below t_min, 0.99"):
        load_preset("mini", ["distill.t_min=0.99"])  # against the default, before anything is encoded
    with pytest.raises(AptError, match="distill.method is 'vsd': input should be 'consistency' or 'dmd'"):
        load_preset("mini", ["distill.method=vsd"])


@pytest.mark.parametrize(
    "name",
    [
        "data.fps",
        "sampling.guidance",
        "distill.lr",
        "distill.guidance",
        "distill.lr_fake",
        "distill.t_min",
        "distill.regression",
        "sampling.shift_video",
        "stage2.demo.image.lr_generator",
        "stage2.demo.image.r1_sigma",
        "train.lora_alpha",
    ],
)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_no_setting_takes_what_is_no_number(name, value):
    with pytest.raises(AptError, match=name.rpartition(".")[2]):
        load_preset("mini", [f"{name}={value}"])


@pytest.mark.parametrize("value", ["0.0001", "1e-9", "1000"])
def test_frame_rates_are_those_of_videos(value):
    with pytest.raises(AptError, match="fps"):
        load_preset("mini", [f"fps={value}"])


def test_a_list_of_one_may_be_written_as_itself():
    assert load_preset("wan2.2-5b", ["data.aspects=16:9", "data.shorter=5"]).data.aspects == ("16:9",)
    assert load_preset("wan2.2-5b", ["data.shorter=[5,9]"]).data.shorter == (5, 9)
