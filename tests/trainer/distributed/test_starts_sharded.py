"""A phase that begins with a LoRA of lower rank and what such files change beside, and watches the motion of
its clips, is the same run on one process and on two; its files and states have the whole of it.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from layouts import Files, Layout, Text, assert_close, run_layouts, setup, write_shards
from safetensors.torch import load_file, save_file

from apt_core.errors import AptError
from apt_core.loading.checkpoint import load_transformer
from apt_core.models.differences import differences
from apt_core.models.lora import add_adapters, merged_state, role, save_lora
from apt_core.models.lora_files import merge, read_lora_for
from trainer.checkpoints.export import export
from trainer.checkpoints.starting_models import describe_state
from trainer.checkpoints.trained_models import ROLE, open_discriminator, open_generator
from trainer.config import Adversarial
from trainer.data.batches import Batches
from trainer.machines.distributed import connect
from trainer.machines.parallel import Parallel
from trainer.run.judge import LatentJudge, motion
from trainer.run.state import Keep
from trainer.stages.adversarial import adversarial
from trainer.stages.networks import Lora
from trainer.stages.watch import Measure

SETTINGS = {
    "updates": 2,
    "batch": 4,
    "lr_generator": 1e-4,
    "lr_discriminator": 1e-4,
    "ema_decay": 0.9,
    "shift": 2.0,
    "r1_weight": 100.0,
    "r1_sigma": 0.01,
    "r1_sigma_time": 0.1,
}


def largest(x):
    return x.flatten(1).amax(1)


def train_watched(files: Files, layout: Layout, out: Path, options: dict | None = None) -> None:
    with connect("cpu", sharded=layout.parallel.sharded) as world:
        batches = Batches(files.shards, Text(), seed=0, held_out=3)
        keep = Keep(
            out / "states",
            every=2,
            judge=LatentJudge(batches, "video", 3, 0, world),
            describe=partial(describe_state, out / "states", files.base, {"base": "tiny"}, (4, 8.0)),
        )
        rows = adversarial(
            "video",
            files.start,
            files.base,
            Adversarial(**SETTINGS),
            setup(layout, out, batches, world, {"lora": Lora(4, 8.0), "keep": keep}),
            watch_every=1,
            measures={"motion": Measure(motion), "largest": Measure(largest, samples=1)},
        )
        if world.main:
            torch.save(rows, out / "rows.pt")


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    write_shards(folder / "shards", samples=31)
    model = add_adapters(load_transformer(files.base), ["generator"], rank=2)
    for p in role(model, "generator").parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_lora(folder / "plain.safetensors", model, "generator", {})
    more = {
        "blocks.0.self_attn.q.diff_b": torch.randn(24),
        "blocks.1.self_attn.norm_k.diff": torch.randn(24),
        "blocks.2.diff_m": torch.randn(1, 6, 24),
        "head.head.diff": torch.randn(16, 24) / 4,
    }
    more = {f"diffusion_model.{key}": value for key, value in more.items()}
    save_file(load_file(folder / "plain.safetensors") | more, folder / "start.safetensors")
    own = Files(files.base, folder / "start.safetensors", folder / "shards")
    for processes in (1, 2):
        layout = Layout(processes, Parallel(1))
        run_layouts(own, processes, [(layout, folder / str(processes), train_watched, None)])
    return folder


def test_one_process_and_two(runs):
    assert_close(runs / "2", runs / "1", 2, 1e-9)
    rows = torch.load(runs / "1" / "rows.pt")
    watched = ("motion_of_real", "motion_of_start", "largest_of_real", "largest_of_start", "held_gap")
    assert all(0 < abs(row[name]) < 10 for row in rows for name in watched)
    assert rows[-1]["judged_motion"] > 0 and rows[0]["r1_gamma_time"] == pytest.approx(1.0)


def test_files_and_states_have_what_the_start_changes_beside_adapters(runs, files, tmp_path):
    path = runs / "1" / "generator.safetensors"
    own = [key for key in load_file(path) if ".lora_" not in key]
    assert len(own) == 4 and "diffusion_model.blocks.2.modulation.diff" in own
    expected = merge(
        load_transformer(files.base), read_lora_for(path, load_transformer(files.base), "x").load()
    )
    start = load_file(runs / "start.safetensors")["diffusion_model.blocks.0.self_attn.q.diff_b"]
    bias = load_transformer(files.base).state_dict()["blocks.0.attn1.to_q.bias"]
    torch.testing.assert_close(expected.state_dict()["blocks.0.attn1.to_q.bias"], bias + start)
    for source in (path, runs / "1" / "states", runs / "2" / "states"):
        opened = open_generator(source, files.base)
        assert opened.base is not None and len(differences(opened.base, ROLE)) == 4
        for name, value in merged_state(opened.base, ROLE).items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    export(runs / "1" / "states", tmp_path / "lora.safetensors", "lora", "fp32", base=str(files.base))
    again = load_file(tmp_path / "lora.safetensors")
    assert again.keys() == load_file(path).keys()
    assert not differences(open_discriminator(runs / "1" / "states")[0].backbone.base, "discriminator")


def test_a_run_does_not_go_on_from_another_start(runs, files):
    own = Files(files.base, runs / "plain.safetensors", runs / "shards")
    with pytest.raises(AptError, match=r"holds a run with another differences \('[0-9a-f]{16}', now None\)"):
        train_watched(own, Layout(1, Parallel(1)), runs / "1")
