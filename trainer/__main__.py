"""The command line: `python -m trainer COMMAND`, or `comfyui-apt COMMAND`."""

from importlib import import_module

from trainer.cli.app import app

for group in ("proof", "training", "sampling", "inside", "bench"):  # the order of --help
    import_module(f"trainer.cli.{group}")


def main() -> None:
    """The entry point of `comfyui-apt`."""
    app(prog_name="comfyui-apt")


if __name__ == "__main__":
    app()
