"""What the terminal shows."""

from rich.console import Console

import trainer.progress
from trainer.progress import columns_table, stage_bar

NAMES = ("fd", "patch_fd", "sharpness", "structure", "alignment", "diversity", "calls", "samples")


def test_the_table_of_columns_fits_80_characters():
    row = dict.fromkeys(NAMES, 0.5) | {"fd": 1551.26, "patch_fd": 10.434, "structure": None, "calls": 50, "samples": 1024}
    console = Console(width=80)
    with console.capture() as shown:
        console.print(columns_table("Video", {"base_25_cfg": row}))
    title, head, line = shown.get().splitlines()
    assert head.split() == list(NAMES)
    assert line.split() == ["base_25_cfg", "1551", "10.43", "0.50", "-", "0.50", "0.50", "50", "1024"]


def test_a_bar_shows_its_title_and_a_loss_in_80_characters(monkeypatch):
    console = Console(width=80)
    monkeypatch.setattr(trainer.progress, "console", console)
    with console.capture() as shown, stage_bar("run [/1]: images") as report:
        report(150, 150, {"d_loss": 1.25, "g_loss": 0.5, "logit_real": 0.1, "other": 7.0})
    assert "run [/1]: images" in shown.get() and "150/150" in shown.get() and "d_loss 1.250" in shown.get()
