"""The trainer's commands as a user types them, run in this process."""

from typer.testing import CliRunner

from trainer.__main__ import app


def command(*arguments):
    """The result, with exit_code, output and stderr. Any error but AptError is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments) -> str:
    """The output of a command that succeeds."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments) -> str:
    """The one sentence of a command that refuses."""
    result = command(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, (
        result.output
    )
    return result.stderr.removeprefix("error: ").strip()
