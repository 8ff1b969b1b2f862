"""The command line: a mistake is one sentence and exit code 2, never a traceback."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from diffusers import WanTransformer3DModel
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from apt_core.files.folders import half_note
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.sources import SHIPPED
from trainer.__main__ import app
from trainer.cli.app import library_on_stderr

# The package may be imported from the checkout, without being installed.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
}


def command(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
    )


def test_help_names_the_commands():
    result = command("--help")
    assert result.returncode == 0
    for name in (
        "precompute",
        "distill",
        "adversarial",
        "generate",
        "evaluate",
        "export",
        "inspect",
        "demo",
        "measure",
        "ablate",
        "probe",
        "walk",
        "attention",
        "preference",
        "pretrain-mini",
    ):
        assert name in result.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ("demo", "--recipe", "wild"),
            "preset mini has no recipe 'wild': use one of demo, proof, paper, stable, dmd.",
        ),
        (("demo", "--preset", "nope"), "there is no preset 'nope'; use one of mini, seaweed-8b, "),
        (("ablate", "--only", "t0,no_r1"), "there is no variant 'no_r1' (did you mean no_ar1"),
        (("measure", "nowhere"), "nowhere holds no run of the demo"),
        (("probe", "nowhere"), "nowhere does not exist: give a checkpoint file"),
        (
            ("walk", "mini", "--seeds", "1"),
            "--seeds 1 cannot be walked through: give two or more whole numbers",
        ),
        (("attention", "."), ". holds no training state of stage 2: give states/PHASE/step-..."),
        (("pretrain-mini", "everything"), "there is no part 'everything' to train"),
        (("pretrain-mini", "text", "--device", "nope"), "torch cannot use the device 'nope' here"),
        (
            ("distill", "mini", "base=nowhere.safetensors", "--dry-run"),
            "base nowhere.safetensors does not exist: give the path of",
        ),
        (
            ("adversarial", "mini", "--phase", "image", "device=nope", "--dry-run"),
            "torch cannot use the device 'nope' here",
        ),
        (
            ("adversarial", "mini", "--phase", "image", "compile=foo", "--dry-run"),
            "compile=foo is not a backend of torch.compile: use one of ",
        ),
        (("distill", "mini", "compile=foo"), "compile=foo is not a backend of torch.compile: use one of "),
        (("bench", "inference", "--device", "nope"), "torch cannot use the device 'nope' here"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_an_unknown_option_is_refused(tmp_path):
    result = command("demo", "--sede", "1", cwd=tmp_path)
    assert result.returncode == 2 and "--sede" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [("demo", "--seed", "-1"), ("demo", "--samples", "1"), ("pretrain-mini", "--seed", "-1")]
)
def test_a_number_out_of_range_is_refused(arguments, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and arguments[1] in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_what_is_kept(tmp_path):
    # Shells start background jobs, this test's run perhaps among them, with Ctrl-C ignored, which children
    # inherit.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('trainer', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "demo"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    try:
        data = tmp_path / "runs" / "demo" / "data"
        deadline = time.monotonic() + 600
        while process.poll() is None and not list(data.glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(data.glob("*.png"))
        process.send_signal(signal.SIGINT)
        complaint = process.communicate(timeout=600)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert complaint == "stopped; what is finished is kept, and the same command goes on from there.\n"


def leaves(command, path=()):
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


OPTIONS = [
    (path, parameter.opts)
    for path, command in leaves(typer.main.get_command(app))
    for parameter in command.params
    if parameter.opts[0].startswith("--")
]


@pytest.mark.parametrize(
    "path, spellings", OPTIONS, ids=[f"{' '.join(path)} {spellings[0]}" for path, spellings in OPTIONS]
)
def test_torchrun_lets_every_option_through(path, spellings, capsys):
    """It looks for beginnings of its own options even behind the module's name, and refuses what could be two
    of them.
    """

    def through(option: str) -> bool:
        given = [*path, option, "value"]
        try:
            return (
                get_args_parser()
                .parse_args(["--nproc-per-node", "2", "-m", "trainer", *given])
                .training_script_args
                == given
            )
        except SystemExit:
            return False

    assert any(map(through, spellings)) and (through("--start") is False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full disk")
def test_a_full_disk_under_the_display_ends_nothing(tmp_path):
    """The log of a batch system, say. It is said where it still can be, and the file is there."""
    arguments = [
        "adversarial",
        "mini",
        "--phase",
        "image",
        "data.images=4",
        "data.clips=0",
        "held_out=0",
        "updates=1",
        "batch=2",
        "warmup=0",
        "save_every=0",
        "--out",
        "run",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
    assert done.returncode in (0, 120), done.stderr  # 120: Python could not flush stdout at its end
    assert (
        (tmp_path / "run" / "apt-image.safetensors").is_file()
        and done.stderr.count("the training goes on without") == 1
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("--gpu-tflops", "nan"),
        ("--gpu-tflops", "inf"),
        ("--gpu-memory", "inf"),
        ("--gpu-memory", "nan"),
        ("--gpus", "0"),
    ],
)
def test_a_machine_of_no_numbers_is_refused(option, value, tmp_path):
    given = {"--gpus": "2", "--gpu-memory": "80", "--gpu-tflops": "800"} | {option: value}
    result = command(
        "distill", "mini", "--dry-run", *(word for pair in given.items() for word in pair), cwd=tmp_path
    )
    assert result.returncode == 2 and "are not a machine: give three numbers above 0" in result.stderr


@pytest.mark.parametrize(
    "arguments, expected, old",
    [
        ([], ("mini", "demo"), False),
        (["--recipe", "proof"], ("mini", "proof"), False),
        (["--preset", "mine.toml", "--recipe", "stable"], ("mine.toml", "stable"), False),
        (["--preset", "proof"], ("mini", "proof"), True),
        (["--recipe", "mine.toml"], ("mine.toml", "demo"), True),
        (["--recipe", "mine.toml", "--preset", "stable"], ("mine.toml", "stable"), True),
    ],
)
def test_demo_takes_preset_and_recipe_and_their_old_places(monkeypatch, arguments, expected, old):
    asked, presets = [], []

    class Loaded:
        stage2 = {"demo": None, "proof": None, "stable": None}

        def with_recipe(self, name, overrides, sections):
            assert not overrides and not sections
            asked.append(name)
            return self

    monkeypatch.setattr("trainer.config.load_preset", lambda name: presets.append(name) or Loaded())
    monkeypatch.setattr("trainer.proof.demo.Demo", lambda *_: SimpleNamespace(run=lambda: None))
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 0 and (presets[-1], *asked) == expected
    assert result.stderr.startswith("deprecated: say --preset") == old


@pytest.mark.parametrize("root", [True, False], ids=["with a handler on the root logger", "without"])
def test_what_the_library_logs_is_shown_once(tmp_path, root, monkeypatch):
    """A folder with both halves of a Wan 2.2 A14B, on a machine where some library has set up logging."""
    mini = load_transformer(SHIPPED["base"])
    for name in ("transformer", "transformer_2"):
        WanTransformer3DModel.save_pretrained(mini, tmp_path / "both" / name)
    heard = []
    if root:
        other = logging.Handler()
        other.emit = heard.append
        monkeypatch.setattr(logging.getLogger(), "handlers", [other])
    else:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
    size = ("--height", "48", "--width", "48", "--frames", "1", "--steps", "1")
    parts = ("--vae", "mini", "--text-encoder", "mini", "--out", str(tmp_path / "out"))
    result = CliRunner().invoke(
        app, ["generate", str(tmp_path / "both"), "a red circle", *size, *parts], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [half_note(tmp_path / "both")] and "both halves" in result.stderr
    log = logging.getLogger("apt_core")
    assert not heard and not log.handlers and log.propagate  # as before the command


def test_logged_sentences_are_printed_as_they_are(capsys):
    with library_on_stderr():
        logging.getLogger("apt_core").warning("%s", "100% of it (%s)")
    assert capsys.readouterr() == ("", "100% of it (%s)\n")
