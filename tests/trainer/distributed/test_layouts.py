"""However a run is laid out over processes and microbatches, it is the same run."""

import pytest
import torch
from layouts import (
    DMD,
    STABLE,
    Layout,
    assert_close,
    load_and_watch,
    mmdit,
    run_layouts,
    state_of,
    train_adversarial,
    train_distill,
)

from apt_core.files.tensorfile import read_tensors
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Lora

LORA = Lora(4, 8.0)
TWO_PASS, SEPARATE = {"discriminator_step": "two_pass"}, {"discriminator_step": "separate"}
MUON = {"optimizer": "muon", "lr": 1e-2}
KINDS = {
    "paper": (train_adversarial, {}),
    "stable": (train_adversarial, STABLE),
    "lora": (train_adversarial, STABLE),
    "mmdit": (train_adversarial, {}),
    "stage1": (train_distill, {}),
    "stage1_lora": (train_distill, {}),
    "stage1_muon": (train_distill, MUON),
    "stage1_mmdit": (train_distill, {}),
    "dmd": (train_distill, DMD | {"regression": 0.25, "regression_steps": 2}),
    "dmd_lora": (train_distill, DMD),
}
"""What is trained: in which stage, with which settings. Of each there is one run in one process, that all
others must equal.
"""

ALONE = {
    "separate": ("paper", Layout(settings=SEPARATE)),
    "two_pass_in_four": ("paper", Layout(parallel=Parallel(microbatch=1), settings=TWO_PASS)),
    "stable_in_four": ("stable", Layout(parallel=Parallel(microbatch=1))),
    "compiled": ("paper", Layout(parallel=Parallel(compile="aot_eager"))),
    "dmd_in_two_parts": ("dmd", Layout(parallel=Parallel(microbatch=1, checkpointing="blocks"))),
}
PAIRS = {
    "two_processes": ("paper", Layout(2)),
    "zero2_in_two": (
        "paper",
        Layout(2, Parallel(1, generator_zero=2, discriminator_zero=2, checkpointing="offload"), TWO_PASS),
    ),
    "stable_in_two": ("stable", Layout(2, Parallel(1, checkpointing="blocks"), SEPARATE)),
    "stable_every_microbatch": (
        "stable",
        Layout(2, Parallel(1, generator_zero=2, sync_every_microbatch=True)),
    ),
    "context_parallel": ("paper", Layout(2, Parallel(context_parallel=2, checkpointing="blocks"), TWO_PASS)),
    "stable_context_parallel_in_two": ("stable", Layout(2, Parallel(2, context_parallel=2), SEPARATE)),
    "lora_sharded": ("lora", Layout(2, Parallel(1, generator_zero=2, checkpointing="offload"), TWO_PASS)),
    "lora_context_parallel": (
        "lora",
        Layout(2, Parallel(2, context_parallel=2, checkpointing="blocks"), TWO_PASS),
    ),
    "mmdit_in_two": ("mmdit", Layout(2, Parallel(1, checkpointing="offload"), TWO_PASS)),
    "mmdit_context_parallel": ("mmdit", Layout(2, Parallel(context_parallel=2), SEPARATE)),
    "stage1_in_two": ("stage1", Layout(2, Parallel(1, generator_zero=2, checkpointing="blocks"))),
    "stage1_lora_in_two": ("stage1_lora", Layout(2, Parallel(1, generator_zero=2, checkpointing="blocks"))),
    "stage1_muon_in_two": ("stage1_muon", Layout(2, Parallel(1))),
    "stage1_mmdit_context_parallel": ("stage1_mmdit", Layout(2, Parallel(context_parallel=2))),
    "dmd_in_two": ("dmd", Layout(2, Parallel(1, generator_zero=2, checkpointing="blocks"))),
    "dmd_lora_in_two": ("dmd_lora", Layout(2, Parallel(1, checkpointing="blocks"))),
    "dmd_lora_context_parallel": ("dmd_lora", Layout(2, Parallel(context_parallel=2))),
}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """The folder of every run, by name; one start of one process and one of two."""
    folder = tmp_path_factory.mktemp("runs")
    special = {
        "lora": {"base": files.base, "start": files.base, "lora": LORA, "load": load_and_watch},
        "mmdit": {"base": mmdit(files.base), "start": mmdit(files.start), "load": load_backbone},
        "stage1_lora": {"lora": LORA},
        "dmd": {"load": load_and_watch},
        "dmd_lora": {"lora": LORA, "load": load_and_watch},
        "stage1_mmdit": {"base": mmdit(files.base), "load": load_backbone},
    }
    one = {kind: (kind, Layout()) for kind in KINDS}
    for processes, named in ((1, one | ALONE), (2, PAIRS)):
        jobs = []
        for name, (kind, layout) in named.items():
            train, settings = KINDS[kind]
            jobs.append(
                (
                    Layout(processes, layout.parallel, {**settings, **layout.settings}),
                    folder / name,
                    train,
                    special.get(kind),
                )
            )
        run_layouts(files, processes, jobs)
    return folder


@pytest.mark.parametrize("name", [*ALONE, *PAIRS])
def test_every_layout_gives_the_losses_and_weights_of_one_process(name, runs):
    kind = (ALONE | PAIRS)[name][0]
    assert_close(runs / name, runs / kind, 5, 1e-9)


@pytest.mark.parametrize("kind", ["paper", "stable", "stage1", "stage1_muon", "dmd"])
def test_what_is_compared_is_far_above_the_tolerance(kind, runs, files):
    stage1 = kind.startswith(("stage1", "dmd"))
    network, start = ("student", files.base) if stage1 else ("generator", files.start)
    moved = (
        state_of(runs / kind, 5)[f"{network}/weights/blocks.0.attn1.to_q.weight"]
        - load_transformer(start).blocks[0].attn1.to_q.weight
    )
    assert moved.abs().max() > 1.5e-5
    assert torch.load(runs / kind / "rows.pt")[-1]["judged"] > 0.01


def assert_base_is_as_it_was(run, files):
    after, before = torch.load(run / "base.pt"), load_transformer(files.base).state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(value, before[key].double()) for key, value in after.items()
    )


@pytest.mark.parametrize("name", ["dmd", "dmd_in_two", "dmd_lora", "dmd_lora_in_two"])
def test_the_base_under_generator_and_fake_score_stays_as_it_was_to_the_last_bit(name, runs, files):
    assert_base_is_as_it_was(runs / name, files)
    state = state_of(runs / name, 5)
    moved = [value for key, value in state.items() if key.startswith("fake/weights") and "lora_B" in key]
    # Ten steps of 1e-5, five of them in one direction at least: B started from zero.
    assert moved and all(value.abs().max() > 4e-5 for value in moved)


@pytest.mark.parametrize("name", ["lora", "lora_sharded", "lora_context_parallel"])
def test_the_base_under_adapters_stays_as_it_was_to_the_last_bit(name, runs, files):
    assert_base_is_as_it_was(runs / name, files)
    (tensors, header), (wanted, _) = (
        read_tensors(runs / run / "generator.safetensors") for run in (name, "lora")
    )
    assert '"kind": "lora"' in header.metadata["apt"] and tensors.keys() == wanted.keys()
    assert all(torch.allclose(value, wanted[key], rtol=2**-22, atol=1e-9) for key, value in tensors.items())
    # Five steps of 5e-6 in one direction, averaged with decay 0.9 from zero, are 1.3 of them.
    assert max(value.abs().max() for key, value in tensors.items() if "lora_B" in key) > 1.3 * 5e-6


def test_all_of_the_mmdit_is_trained(runs, files):
    trained, start = (
        load_backbone(runs / "mmdit_in_two" / "generator.safetensors"),
        load_backbone(mmdit(files.start)),
    )
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
