"""The command line: a mistake is one sentence and exit code 2, never a traceback."""

import subprocess
import sys

import pytest


def command(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "trainer", *arguments], capture_output=True, text=True, cwd=cwd)


def test_help_names_the_commands():
    result = command("--help")
    assert result.returncode == 0
    for name in ("demo", "measure", "pretrain-mini"):
        assert name in result.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("demo", "--preset", "wild"), "preset mini has no stage 2 named 'wild'; it has paper, stable."),
        (("demo", "--recipe", "nope"), "there is no preset 'nope'; use one of mini, or the path of a .toml file."),
        (("measure", "nowhere"), "nowhere holds no run of the demo"),
        (("pretrain-mini", "everything"), "there is no part 'everything' to train"),
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
