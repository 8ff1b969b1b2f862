"""`accelerate launch` starts what torchrun starts, or says in a sentence why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from apt_core.errors import AptError
from apt_core.files.tensorfile import read_tensors
from trainer.__main__ import app
from trainer.machines.distributed import connect

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "trainer" / "tiny.toml"
SETTINGS = ["updates=1", "batch_image=2", "batch_video=2", "save_every=0", "judge_samples=0", "held_out=0"]
SETTINGS += ["context_parallel=2"]  # which one process alone cannot have
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    + ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"],
    "accelerate, cpu": ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}


def launch(name: str, out: Path, latents: Path) -> subprocess.CompletedProcess:
    command = ["-m", *LAUNCHERS[name], "-m", "trainer", "distill", TINY, *SETTINGS, "--shards", latents]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.run(
        [sys.executable, *map(str, command), "--out", str(out)],
        cwd=out.parent,
        env=environment
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(out.parent),  # no settings of whoever runs this
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    small = ["data.images=4", "data.clips=4", "held_out=0"]
    done = CliRunner().invoke(
        app, ["precompute", str(TINY), *small, "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return out / "latents"


def test_accelerate_trains_what_torchrun_trains(latents, tmp_path):
    weights = {}
    for name in ("torchrun", "accelerate"):
        done = launch(name, tmp_path / name, latents)
        assert done.returncode == 0, done.stderr
        weights[name], _ = read_tensors(tmp_path / name / "distilled.safetensors")
    assert weights["torchrun"].keys() == weights["accelerate"].keys()
    assert all(value.equal(weights["accelerate"][key]) for key, value in weights["torchrun"].items())


def test_one_process_in_the_place_of_two_is_refused(latents, tmp_path):
    done = launch("accelerate, cpu", tmp_path / "run", latents)
    assert done.returncode != 0 and not (tmp_path / "run" / "distilled.safetensors").exists()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == (
        "error: accelerate launch was told to start several processes but started one, "
        "as it does with --cpu: "
        "give --multi_gpu --num_processes N instead (processes without a GPU use the CPU)."
    )


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "megatron_lm"])
def test_its_own_sharding_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(
        AptError, match=f"got --use_{name}, but this trainer does its own sharding: leave it out"
    ):
        with connect():
            pass
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "false")
    with connect() as world:
        assert world.size == 1


def test_it_passes_the_trainers_options_on():
    given = ["distill", "tiny.toml", "updates=1", "--out", "run", "--seed", "3", "--dry-run", "--gpus", "2"]
    args = launch_command_parser().parse_args(["--multi_gpu", "-m", "trainer", *given])
    assert (args.training_script, args.training_script_args, args.module) == ("trainer", given, True)
