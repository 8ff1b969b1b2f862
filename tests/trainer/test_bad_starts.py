"""What cannot be a start of stage 2, or does not fit the card, is one sentence with what would do, before a
sample is encoded or a weight read.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from apt_core.files.origins import RCM_PREFIX
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import save_generator
from apt_core.loading.sources import SHIPPED
from apt_core.models.wan import WanBackbone
from trainer.__main__ import app
from trainer.config import load_preset
from trainer.jobs.plan import make_plan
from trainer.machines.machine import GIB, Machine

TINY = str(Path(__file__).parent / "tiny.toml")
LAYER = "diffusion_model.blocks.0.self_attn.q"
LORA = ["mode=lora", "lora_rank=2"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Path:
    """Files of each kind of mistake, by name."""
    folder = tmp_path_factory.mktemp("starts")

    def lora(name, rank=2, width=128):
        down, up = torch.ones(rank, width), torch.ones(width, rank)
        save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, folder / name)

    lora("wide.safetensors", width=1536)
    lora("high.safetensors", rank=3)
    base = load_backbone(SHIPPED["base"])
    save_generator(folder / "late.safetensors", base, base.config, {"timestep": 750})
    save_generator(folder / "whole.safetensors", base, base.config, {})
    shallow = WanBackbone(
        num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=5, text_dim=96, in_channels=16
    )
    save_generator(folder / "shallow.safetensors", shallow, shallow.config, {})
    whole = load_file(folder / "whole.safetensors")
    sparse = {"blocks.0.self_attn.attn_op.local_attn.proj_l.weight": torch.ones(8, 8)}
    save_file({RCM_PREFIX + k: v for k, v in (whole | sparse).items()}, folder / "sparse.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in whole.items()}, folder / "coarse.safetensors")
    save_file(
        {"someone.own.name": torch.ones(2, 128)},
        folder / "claims.safetensors",
        metadata={
            "format": "pt",
            "apt": json.dumps({"format": 1, "kind": "lora", "rank": 2, "timestep": 1000}),
        },
    )
    (folder / "pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    return folder


@pytest.mark.parametrize(
    "name, settings, says",
    [
        (
            "wide",
            LORA,
            [
                "changes blocks.0.self_attn.q.weight by (1536, 1536), but in",
                "it is (128, 128)",
                "of width 1536 (that of Wan 2.1 1.3B).",
            ],
        ),
        ("wide", [], ["give as the base the model that this LoRA was trained on"]),
        ("claims", [], ["someone.own.name cannot be placed in a Wan transformer"]),
        ("claims", LORA, ["someone.own.name cannot be placed in a Wan transformer"]),
        (
            "high",
            LORA,
            ["has rank 3 at blocks.0.self_attn.q", "(lora_rank=3) or more, or a LoRA of lower rank."],
        ),
        (
            "late",
            [],
            [
                "is for timestep 750, but one step from noise is a call at 1000",
                "run `distill` with these as the base first.",
            ],
        ),
        ("whole", LORA, ["is a whole model, which adapters over", "train with mode=full, or give base="]),
        ("shallow", [], ["--start-from", "is not the model of preset tiny (blocks 5 instead of 6)"]),
        (
            "sparse",
            [],
            [
                "was trained with TurboDiffusion's sparse-linear attention (SLA)",
                "give a model or a LoRA that",
            ],
        ),
        ("coarse", [], ["--start-from", "too coarse to train from: give the model in fp32, bf16 or fp16."]),
        ("pickle", [], ["pickle.safetensors"]),
        ("gone", [], ["--start-from", "does not exist: give a model or a LoRA over the base."]),
    ],
)
def test_a_start_that_cannot_be(starts, tmp_path, name, settings, says):
    start = starts / f"{name}.safetensors"
    given = [
        "adversarial",
        TINY,
        "--phase",
        "video",
        *settings,
        "--start-from",
        str(start),
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output
    sentence = result.stderr.removeprefix("error: ").strip()
    assert sentence.count("\n") == 0 and sentence.endswith(".") and str(start) in sentence
    assert [part for part in says if part not in sentence] == [], sentence
    assert not (tmp_path / "run").exists()


def test_the_base_itself_is_a_start_of_adapters_by_any_path(starts):
    """A link to it is no other model."""
    link = starts / "linked.safetensors"
    link.symlink_to(SHIPPED["base"])
    preset = load_preset(TINY, LORA, ("train",))
    start = make_plan(preset, "video", starts / "run", start=link).start
    assert start.path == SHIPPED["base"] and start.note is None


@pytest.mark.parametrize(
    "phase, gib, remedy", [("image", 5, "take 2 such GPUs ("), ("video", 16, "add stage2.weekend.video.")]
)
def test_a_card_that_is_too_small(tmp_path, monkeypatch, phase, gib, remedy):
    """The run itself, not only its account: nothing is made, and what would fit is named."""
    small = Machine("a card", 1, gib * GIB, 1e14)
    monkeypatch.setattr("trainer.jobs.plan.this_machine", lambda device, compute: small)
    monkeypatch.setattr("trainer.jobs.plan.find_base", lambda preset: Path("base.safetensors"))
    given = [
        "adversarial",
        "wan2.1-1.3b-480p",
        "--recipe",
        "weekend",
        "--phase",
        phase,
        "base=x",
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    sentence = result.stderr.removeprefix("error: ").strip()
    assert sentence.startswith(f"wan2.1-1.3b-480p, {phase} phase, needs ") and sentence.count("\n") == 0
    assert f"GiB on each GPU, which {gib} GiB cannot hold: {remedy}" in sentence and sentence.endswith(".")
    assert not (tmp_path / "run").exists()
