"""A start is looked at once, before the run; what it leaves in memory beside adapters is in the account of
the run and of `--dry-run`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.files.tensorfile import read_tensors
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import save_generator
from apt_core.loading.sources import SHIPPED
from apt_core.models.differences import differences
from trainer.__main__ import app
from trainer.config import load_preset
from trainer.jobs.plan import find_start, make_plan
from trainer.jobs.starts import open_start
from trainer.machines.account import account
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Lora, Start, adversarial_networks, read_start

TINY = str(Path(__file__).parent / "tiny.toml")
KEPT = 4 * (128 * 512 + 128 + 128)  # bytes of what `few_step` changes beside adapters
LINE = "GiB per GPU, what the start changes beside adapters"


@pytest.fixture(scope="module")
def few_step(tmp_path_factory) -> Path:
    """A LoRA with a matrix, a norm and a bias that adapters cannot hold."""
    path = tmp_path_factory.mktemp("start") / "few-step.safetensors"
    tensors = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 128),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(128, 2),
        "blocks.1.ffn.2.diff": torch.ones(128, 512),
        "blocks.0.self_attn.norm_q.diff": torch.ones(128),
        "blocks.0.self_attn.q.diff_b": torch.ones(128),
    }
    save_file({f"diffusion_model.{name}": value for name, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A whole model that is not the base."""
    path, base = tmp_path_factory.mktemp("whole") / "whole.safetensors", load_backbone(SHIPPED["base"])
    save_generator(path, base, base.config, {})
    return path


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """The path of each file that Python opens, whoever opens it, as it goes on."""
    paths, watching = [], True

    def hook(event: str, given: tuple) -> None:
        if watching and event == "open" and isinstance(given[0], str | os.PathLike):
            paths.append(os.fspath(given[0]))

    sys.addaudithook(hook)
    yield paths
    watching = False  # Python has no way to remove a hook


def preset(*settings):
    return load_preset(TINY, ("mode=lora", "lora_rank=2", *settings), ("train", "stage2.paper.video"))


def test_what_it_counts_is_what_the_networks_hold(few_step):
    base = Path(SHIPPED["base"])
    networks = adversarial_networks(few_step, base, load_backbone, World(), Parallel(), Lora(2))
    held = sum(value.nbytes for value in differences(networks.base, "generator").values())
    assert open_start(few_step, preset(), base).frozen == held == KEPT
    assert open_start(few_step, preset(), None).frozen == KEPT  # by the preset's shape
    assert open_start(few_step, preset("mode=full"), base).frozen == 0


@pytest.mark.parametrize("settings, networks", [((), 1), (("discriminator_start=start",), 2)])
@pytest.mark.parametrize("start, mode", [("few_step", "lora"), ("few_step", "full"), ("whole", "full")])
def test_a_start_is_looked_at_once(start, mode, settings, networks, opened, tmp_path, request):
    """The plan opens it once. After that it is only opened to read its weights, for each network."""
    path = request.getfixturevalue(start)

    def opens(work: Callable[[], object]) -> tuple[int, object]:
        before, result = len(opened), work()
        return opened[before:].count(str(path)), result

    times, plan = opens(partial(make_plan, preset(f"mode={mode}", *settings), "video", tmp_path, start=path))
    assert times == 1
    reading, _ = opens(partial(read_tensors if start == "few_step" else load_backbone, path))
    make = partial(adversarial_networks, find_start(plan), plan.base, load_backbone, World(), Parallel())
    first = plan.settings.discriminator_start
    assert opens(partial(make, plan.lora, discriminator_start=first))[0] == networks * reading > 0


def test_a_start_for_other_networks_is_refused(few_step, whole):
    """A caller may hand on one that was looked at for whole networks."""
    base = Path(SHIPPED["base"])
    with pytest.raises(AptError, match=r"is a whole model, which adapters over .* cannot hold"):
        adversarial_networks(Start(whole), base, load_backbone, World(), Parallel(), Lora(2))
    start = read_start(read_checkpoint(few_step), base, partial(load_backbone, base, device="meta"), None)
    with pytest.raises(AptError, match=r"has rank 2 at .*, but the adapters have 1: take rank 2"):
        adversarial_networks(start, base, load_backbone, World(), Parallel(), Lora(1))


@pytest.mark.parametrize("settings, times", [((), 1), (("discriminator_start=start",), 2)])
def test_a_plan_counts_it_for_each_network_that_starts_there(few_step, tmp_path, settings, times):
    one = preset(*settings)
    plan, without = make_plan(one, "video", tmp_path, start=few_step), make_plan(one, "video", tmp_path)
    assert plan.account.bytes - without.account.bytes == times * KEPT
    assert plan.start.frozen == KEPT and without.start is None
    assert account(preset("mode=full", *settings), "video", None, 1, KEPT) == account(
        preset("mode=full", *settings), "video"
    )


def test_a_phase_counts_what_the_phase_before_left(few_step, tmp_path):
    (tmp_path / "apt-image.safetensors").write_bytes(few_step.read_bytes())
    plan = make_plan(preset(), "video", tmp_path)
    assert plan.start.path == tmp_path / "apt-image.safetensors" and plan.start.frozen == KEPT


def dry_run(*given):
    return CliRunner().invoke(
        app, ["adversarial", TINY, "--phase", "video", "--dry-run", "mode=lora", "lora_rank=2", *given]
    )


@pytest.mark.parametrize("machine", [(), ("--gpus", "1", "--gpu-memory", "24")])
def test_a_dry_run_counts_it_too(few_step, machine):
    without, counted = dry_run(*machine), dry_run("--start-from", str(few_step), *machine)
    assert without.exit_code == counted.exit_code == 0, counted.output
    assert LINE not in without.output and LINE in counted.output
    note = (
        f"{few_step} does not say which timesteps it was trained for. Stage 2 calls it once, at timestep 1000"
    )
    assert note in counted.output and "does not say which timesteps" not in without.output
    high = dry_run("lora_rank=1", "--start-from", str(few_step), *machine)
    assert high.exit_code == 2 and "(lora_rank=2) or more" in high.stderr
    gone = dry_run("--start-from", "gone.safetensors", *machine)
    assert gone.exit_code == 2 and "--start-from gone.safetensors does not exist" in gone.stderr


def test_a_dry_run_shows_the_plan_of_the_run(few_step, tmp_path):
    """What lies in the run's folder is counted too."""
    (tmp_path / "apt-image.safetensors").write_bytes(few_step.read_bytes())
    shown = dry_run("--out", str(tmp_path))
    assert shown.exit_code == 0 and LINE in shown.output, shown.output
    assert (
        f"{tmp_path / 'apt-image.safetensors'} does not say which timesteps it was trained for"
        in shown.output
    )
    needed = make_plan(preset(), "video", tmp_path).account.bytes / 2**30
    assert f"It fits: {needed:.1f} of " in shown.output
    assert f"GiB per GPU, in all {needed:.2f}" in " ".join(shown.output.split())


def test_a_dry_run_knows_no_base_and_still_names_a_whole_model(tmp_path):
    start = ["--start-from", str(SHIPPED["base"])]
    result = CliRunner().invoke(
        app, ["adversarial", TINY, "--phase", "video", "--dry-run", "mode=lora", "base=", *start]
    )
    assert result.exit_code == 2
    assert "is a whole model, which adapters over the base of preset tiny cannot hold" in result.stderr
