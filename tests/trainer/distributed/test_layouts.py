"""However a run is laid out over processes and microbatches, it is the same run."""

import pytest
import torch
from layouts import STABLE, Layout, assert_close, mmdit, run_layout, state_of, train_distill

from apt_core.checkpoint import load_transformer
from apt_core.tensorfile import read_tensors
from apt_core.sources import load_backbone
from trainer.networks import Lora
from trainer.parallel import Parallel

ONE = {"paper": Layout(), "stable": Layout(settings=STABLE)}
OTHERS = {
    "separate": ("paper", Layout(settings={"discriminator_step": "separate"})),
    "two_pass_in_four": ("paper", Layout(parallel=Parallel(microbatch=1), settings={"discriminator_step": "two_pass"})),
    "compiled": ("paper", Layout(1, Parallel(compile="aot_eager"))),
    "two_processes": ("paper", Layout(2)),
    "two_processes_zero2_in_two": (
        "paper",
        Layout(2, Parallel(microbatch=1, generator_zero=2, discriminator_zero=2, checkpointing="offload"), {"discriminator_step": "two_pass"}),
    ),
    "stable_two_processes_in_two": ("stable", Layout(2, Parallel(microbatch=1, checkpointing="blocks"), {**STABLE, "discriminator_step": "separate"})),
    "stable_in_four": ("stable", Layout(1, Parallel(microbatch=1), STABLE)),
    "context_parallel": ("paper", Layout(2, Parallel(context_parallel=2, checkpointing="blocks"), {"discriminator_step": "two_pass"})),
    "stable_context_parallel_in_two": ("stable", Layout(2, Parallel(2, context_parallel=2), {**STABLE, "discriminator_step": "separate"})),
    "stable_every_microbatch": ("stable", Layout(2, Parallel(microbatch=1, generator_zero=2, sync_every_microbatch=True), STABLE)),
}


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    return {name: run_layout(files, layout, tmp_path_factory.mktemp(name)) for name, layout in ONE.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_gives_the_losses_and_weights_of_one_process(name, one, files, tmp_path):
    objective, layout = OTHERS[name]
    assert_close(run_layout(files, layout, tmp_path), one[objective], 5, 1e-5)
    moved = state_of(tmp_path, 5)["generator/weights/blocks.0.attn1.to_q.weight"] - load_transformer(files.start).blocks[0].attn1.to_q.weight
    assert moved.abs().max() > 1.5e-5  # what is compared is far above the tolerance


@pytest.mark.parametrize("options", [{}, {"lora": Lora(4, 8.0)}], ids=["full", "lora"])
def test_distillation_too(options, files, tmp_path):
    one = run_layout(files, Layout(), tmp_path / "one", train_distill, options)
    two = run_layout(files, Layout(2, Parallel(microbatch=1, generator_zero=2, checkpointing="blocks")), tmp_path / "two", train_distill, options)
    assert_close(two, one, 5, 1e-5)


ADAPTED = {
    "sharded": Parallel(microbatch=1, generator_zero=2, checkpointing="offload"),
    "context_parallel": Parallel(microbatch=2, context_parallel=2, checkpointing="blocks"),
}


@pytest.fixture(scope="module")
def adapted(files, tmp_path_factory):
    return run_layout(files, Layout(settings=STABLE), tmp_path_factory.mktemp("adapted"), options={"start": files.base, "lora": Lora(4, 8.0)})


@pytest.mark.parametrize("parallel", ADAPTED.values(), ids=ADAPTED)
def test_adapters_over_one_shared_base_too(parallel, adapted, files, tmp_path):
    layout = Layout(2, parallel, {**STABLE, "discriminator_step": "two_pass"})
    run_layout(files, layout, tmp_path, options={"start": files.base, "lora": Lora(4, 8.0)})
    assert_close(tmp_path, adapted, 5, 1e-5)
    (tensors, header), (wanted, _) = read_tensors(tmp_path / "generator.safetensors"), read_tensors(adapted / "generator.safetensors")
    assert "lora" in header.metadata["apt"] and tensors.keys() == wanted.keys()
    assert all(torch.allclose(value, wanted[name], atol=1e-5) for name, value in tensors.items())
    assert max(value.abs().max() for name, value in tensors.items() if "lora_B" in name) > 2e-5


def test_the_mmdit_too(files, tmp_path):
    options = {"start": mmdit(files.start), "base": mmdit(files.base), "load": load_backbone}
    one = run_layout(files, Layout(), tmp_path / "one", options=options)
    layout = Layout(2, Parallel(microbatch=1, checkpointing="offload"), {"discriminator_step": "two_pass"})
    two = run_layout(files, layout, tmp_path / "two", options=options)
    assert_close(two, one, 5, 1e-5)
    trained, start = load_backbone(two / "generator.safetensors"), load_backbone(mmdit(files.start))
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
