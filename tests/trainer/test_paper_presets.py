"""`paper` is the paper, number by number, in every preset; the miniature's numbers stand beside the paper's
own.
"""

import re

import pytest

from apt_core.models.wan import PAPER_FRACTIONS
from trainer.config import PRESETS, load_preset

# arXiv 2501.08316, sections 3.2, 3.3 and 3.5.
GUIDANCE = 7.5
BOTH = {
    "ema_decay": 0.995,
    "ema_warmup": 0,
    "warmup": 0,
    "r1_weight": 100,
    "r1_sigma_time": None,
    "r2_weight": 0,
    "r2_sigma_time": None,
    "reg_fraction": 1,
    "centering": 0,
    "relativistic": False,
    "lr_heads": None,
}
BOTH |= {
    "taps": PAPER_FRACTIONS,
    "discriminator_time": None,
    "discriminator_start": "base",
    "train_backbone": True,
}
PAPER = {
    "image": BOTH
    | {
        "updates": 350,
        "batch": 9062,
        "lr_generator": 5e-6,
        "lr_discriminator": 5e-6,
        "shift": 1,
        "r1_sigma": 0.01,
    },
    "video": BOTH
    | {
        "updates": 300,
        "batch": 2048,
        "lr_generator": 3e-6,
        "lr_discriminator": 3e-6,
        "shift": 12,
        "r1_sigma": 0.1,
    },
}
REAL = sorted(path.stem for path in PRESETS.glob("*.toml") if path.stem != "mini")


@pytest.mark.parametrize("phase", PAPER)
@pytest.mark.parametrize("name", REAL)
def test_every_number_of_the_paper(name, phase):
    settings = getattr(load_preset(name).phases("paper"), phase).model_dump()
    settings.pop("discriminator_step")  # how its passes are run: the gradients are the same
    assert settings.pop("r2_sigma")  # unused
    assert settings == PAPER[phase]


@pytest.mark.parametrize("name", REAL)
def test_stage_1_of_the_paper_has_its_guidance(name):
    assert load_preset(name).with_recipe("paper").distill.guidance == GUIDANCE
    assert load_preset(name).with_recipe("budget").distill.guidance == load_preset(name).distill.guidance


def test_the_miniature_names_the_papers_number_beside_its_own():
    text = (PRESETS / "mini.toml").read_text()
    for phase, paper in PAPER.items():
        section = text.split(f"[stage2.paper.{phase}]\n")[1].split("[")[0]
        beside = dict(re.findall(r"^(\w+) = \S+ +# ([\d.e-]+)", section, re.MULTILINE))
        assert {
            "updates",
            "batch",
            "lr_generator",
            "lr_discriminator",
            "ema_decay",
            "shift",
            "r1_weight",
            "r1_sigma",
        } <= beside.keys()
        assert {name: float(value) for name, value in beside.items()} == {
            name: paper[name] for name in beside
        }
    assert len(re.findall(r"^guidance = \S+ +# 7.5", text, re.MULTILINE)) == 2
