"""The blocks of CONTRIBUTING.md do what they are shown for, and what a new backbone meets is one sentence."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from commands import command

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_header
from apt_core.loading import backbones
from apt_core.loading.backbones import kind_named, kind_of, kind_of_file, load_backbone, register
from apt_core.loading.mmdit_files import MMDIT_KIND, build_mmdit, own_kind
from apt_core.models.backbone import Backbone
from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.wan import WanBackbone
from trainer.checkpoints.inspect import inspect
from trainer.config import load_preset
from trainer.machines import counts
from trainer.machines.counts import sizes_of
from trainer.mini import ASSETS
from trainer.mini.clips import draw
from trainer.mini.features import load_features

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
TINY, TINY_MMDIT = (ROOT / "tests" / "trainer" / f"{name}.toml" for name in ("tiny", "tiny_mmdit"))
SHORT = [
    "updates=1",
    "batch=2",
    "data.images=4",
    "data.clips=0",
    "held_out=0",
    "save_every=0",
    "judge_samples=0",
]


def names_of(block: str) -> dict:
    """What a block defines."""
    names = {"__name__": "contributed"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


def lacking(model) -> list[str]:
    """What `Backbone` asks for and a model has not."""
    asked = [*Backbone.__annotations__, *(name for name in vars(Backbone) if name[0] != "_")]
    return [name for name in asked if not hasattr(model, name)]


@pytest.fixture
def registry(monkeypatch):
    """Both lists as they are, for one test."""
    monkeypatch.setattr(backbones, "_TARGETS", dict(backbones._TARGETS))
    monkeypatch.setattr(counts, "COUNTS", dict(counts.COUNTS))


@pytest.fixture
def preset_of(tmp_path):
    def write(kind: str) -> Path:
        path = tmp_path / "preset.toml"
        path.write_text(TINY_MMDIT.read_text(encoding="utf-8").replace('kind = "mmdit"', f'kind = "{kind}"'))
        return path

    return write


def test_there_are_three_and_they_are_short():
    assert len(BLOCKS) == 3 and max(block.count("\n") for block in BLOCKS) < 30


def test_the_backbone_is_counted_trained_saved_and_loaded(registry, preset_of, tmp_path):
    RawTextMMDiT = names_of(BLOCKS[0])["RawTextMMDiT"]
    model = load_preset(str(preset_of("raw-text-mmdit"))).model
    kind = kind_named(model.kind)
    shape = (model.layers, model.heads, model.head_dim, model.ffn, model.channels, model.text_dim)
    torch.manual_seed(0)
    first, plain = kind.build(*shape), build_mmdit(*shape)
    assert type(first) is RawTextMMDiT and lacking(first) == []
    assert kind_of(first) is kind and kind_of(plain) is MMDIT_KIND
    fewer = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in first.parameters())
    assert (
        sizes_of(model.model_copy(update={"kind": "mmdit"})).body - sizes_of(model).body
        == fewer
        == model.text_dim
    )

    base, out = tmp_path / "base.safetensors", tmp_path / "run"
    kind.save(base, first, first.config, {"kind": "base"})
    drawn = command("precompute", TINY, *SHORT[2:5], "--out", out)  # drawn clips, of the same size
    assert drawn.exit_code == 0, drawn.output
    done = command(
        "adversarial",
        preset_of(kind.name),
        "--phase",
        "image",
        f"base={base}",
        "--start",
        base,
        *SHORT,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    trained = load_backbone(out / "apt-image.safetensors")
    assert (
        type(trained) is RawTextMMDiT and "mmdit" not in read_header(out / "apt-image.safetensors").metadata
    )
    before, after = first.state_dict(), trained.state_dict()
    assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in before)
    assert inspect(out / "apt-image.safetensors")["what"] == "MMDiT without text norm of this trainer"

    again = tmp_path / "again.safetensors"
    kind.save(again, trained, trained.config, {"kind": "generator"})
    assert kind_of_file(again) is kind
    assert all(torch.equal(value, after[key]) for key, value in load_backbone(again).state_dict().items())
    refused = command(
        "adversarial", TINY_MMDIT, "--phase", "image", f"base={base}", "--start", base, "--out", out
    )
    assert (
        "is an MMDiT without text norm, but preset tiny-mmdit is for another kind of model" in refused.stderr
    )


@pytest.mark.parametrize("kind", ["wan", "mmdit"])
def test_the_kinds_that_are_there_offer_all_that_is_asked_for(kind):
    with torch.device("meta"):
        model = kind_named(kind).build(1, 2, 52, 64, 16, 24)
    assert isinstance(model, {"wan": WanBackbone, "mmdit": MMDiTBackbone}[kind])
    assert lacking(model) == []
    assert {"config", "blocks", "keep_blocks"} <= set(lacking(torch.nn.Linear(1, 1)))


def test_a_script_that_imports_the_block_is_the_command_line_with_it(preset_of, tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS[0], encoding="utf-8")
    script = tmp_path / "run.py"
    script.write_text("import mine\nfrom trainer.__main__ import main\nmain()\n", encoding="utf-8")
    command = [sys.executable, script, "settings", preset_of("raw-text-mmdit")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr  # without the import the preset's kind is refused
    assert "raw-text-mmdit" in done.stdout


def test_a_name_is_given_once(registry):
    with pytest.raises(
        AptError, match="^a backbone named 'mmdit' exists already: give the new one another name.$"
    ):
        register(own_kind("mmdit", "another", MMDiTBackbone, build_mmdit))
    register(MMDIT_KIND)  # the same again is no other
    assert kind_named("mmdit") is MMDIT_KIND


def test_an_unknown_kind_is_one_sentence(registry, preset_of, tmp_path):
    refused = command("adversarial", preset_of("unet"), "--phase", "image", "--out", tmp_path / "run")
    assert refused.exit_code == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert "model.kind" in refused.stderr and "'unet'" in refused.stderr
    assert "it must be one of wan, mmdit" in refused.stderr
    with pytest.raises(AptError, match="^there is no backbone named 'unet': use one of wan, mmdit.$"):
        kind_named("unet")
    register(own_kind("uncounted", "an uncounted one", MMDiTBackbone, build_mmdit))
    with pytest.raises(
        AptError, match="^there are no parameter and FLOP counts for a uncounted: add them to"
    ):
        sizes_of(load_preset(str(preset_of("uncounted"))).model)


class Stub:
    """As much of ComfyUI's V3 interface as one node needs: what it is given is kept."""

    def __init__(self, *values, **named):
        self.values, self.__dict__ = values, {**named, "values": values}


def test_the_node_has_its_schema_and_its_result(monkeypatch):
    latest = ModuleType("comfy_api.latest")
    kind = SimpleNamespace(Input=Stub, Output=Stub)
    latest.io = SimpleNamespace(ComfyNode=object, Schema=Stub, Latent=kind, NodeOutput=Stub)
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    node = names_of(BLOCKS[1])["APTFirstFrame"]
    schema = node.define_schema()
    assert (schema.node_id, schema.display_name, schema.category) == (
        node.__name__,
        "First Latent Frame",
        "APT",
    )
    assert [item.values for item in schema.inputs] == [("latent",)]
    assert all(item.tooltip.endswith(".") for item in schema.inputs + schema.outputs)
    samples = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 2, 2)
    given = {"samples": samples, "downscale_ratio_temporal": 4}
    (result,) = node.execute(given).values
    assert torch.equal(result["samples"], samples[:, :, 0:1]) and result["downscale_ratio_temporal"] == 4
    assert given["samples"] is samples


def test_the_figure_has_its_value():
    names = names_of(BLOCKS[2])
    pixels = np.zeros((2, 1, 4, 4, 3), np.uint8)
    assert names["contrast"](pixels) == 0
    pixels[0, :, :, :2] = 255
    assert names["contrast"](pixels) == pytest.approx((0.5 + 0) / 2)
    clips, scenes = draw(3, range(4), False)
    reference = names["WithContrast"](load_features(ASSETS / "features.safetensors"), clips)
    row = reference.measure(clips, scenes)
    assert row["structure"] == 1 and row["contrast"] == names["contrast"](clips) > 0


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_two_branches_that_each_add_a_line_to_the_change_log_merge(tmp_path):
    for name in (".gitattributes", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        said = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr

    log, before = tmp_path / "CHANGELOG.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    git("init", "--quiet", "--initial-branch=one"), git("add", "."), git("commit", "--quiet", "-m", "both")
    git("branch", "two")
    for branch in ("one", "two"):
        git("checkout", "--quiet", branch)
        log.write_text(
            f"{before}- What {branch} did,\n  in two lines.\n- And {branch} more.\n", encoding="utf-8"
        )
        git("commit", "--quiet", "--all", "-m", branch)
    git("rebase", "--quiet", "one")
    both = "".join(
        f"- What {branch} did,\n  in two lines.\n- And {branch} more.\n" for branch in ("one", "two")
    )
    assert log.read_text(encoding="utf-8") == before + both
