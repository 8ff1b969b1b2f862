"""A phase that begins with a LoRA of lower rank, and watches the motion of its clips, is the same run on one
process and on two.
"""

from pathlib import Path

import pytest
import torch
from layouts import Files, Layout, Text, assert_close, run_layouts, write_shards

from apt_core.loading.checkpoint import load_transformer
from apt_core.models.lora import add_adapters, role, save_lora
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
        rows = adversarial(
            "video",
            files.start,
            files.base,
            batches,
            Adversarial(**SETTINGS),
            out / "generator.safetensors",
            seed=0,
            metadata={},
            world=world,
            parallel=layout.parallel,
            lora=Lora(4, 8.0),
            keep=Keep(out / "states", every=2, judge=LatentJudge(batches, "video", 3, 0, world)),
            watch_every=1,
            measures={"motion": Measure(motion), "largest": Measure(largest, samples=1)},
            report=lambda *args: None,
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
    save_lora(folder / "start.safetensors", model, "generator", {})
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
