"""What the terminal shows."""

from pathlib import Path

from rich.console import Console

import trainer.run.progress
from trainer.run.progress import columns_table, say_there, stage_bar

NAMES = ("fd", "patch_fd", "sharpness", "structure", "alignment", "diversity", "motion", "calls")


def test_the_table_of_columns_fits_80_characters():
    row = dict.fromkeys(NAMES, 0.5) | {
        "fd": 1551.26,
        "patch_fd": 10.434,
        "structure": None,
        "motion": 14.25,
        "calls": 50,
    }
    console = Console(width=80)
    with console.capture() as shown:
        console.print(columns_table("Video", {"base_25_cfg": row}))
    title, head, line = shown.get().splitlines()
    assert head.split() == list(NAMES)
    assert line.split() == ["base_25_cfg", "1551", "10.43", "0.50", "-", "0.50", "0.50", "14.25", "50"]


ROW = {"d_loss": 1.25, "g_loss": 0.5, "logit_real": 0.1, "r1_gamma": 9.0, "other": 7.0}


def test_a_bar_shows_its_title_and_the_metrics_in_80_characters(monkeypatch):
    console = Console(width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(trainer.run.progress, "console", console)
    with console.capture() as shown, stage_bar("run [/1]: images") as report:
        report(150, 150, ROW)
    assert "run [/1]: images" in shown.get() and "150/150" in shown.get()
    assert (
        "d_loss 1.25  g_loss 0.5  real 0.1  \u03bb\u03c3\u00b2 9" in shown.get()
        and "other" not in shown.get()
    )


def test_a_log_gets_a_line_twice_a_minute(monkeypatch):
    console, clock = Console(width=80), iter(range(0, 1000, 10))
    monkeypatch.setattr(trainer.run.progress, "console", console)
    monkeypatch.setattr(trainer.run.progress.time, "monotonic", lambda: next(clock))
    with console.capture() as shown, stage_bar("run [/1]: images") as report:
        for done in range(1, 9):
            report(done, 8, ROW)
    lines = shown.get().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"run [/1]: images {done}/8" for done in (1, 4, 7, 8)]
    assert lines[1].endswith("0:00:40  d_loss 1.25  g_loss 0.5  real 0.1  \u03bb\u03c3\u00b2 9")


def test_what_an_earlier_run_made_is_told(capsys):
    say_there(0, 5, "clips", Path("out"))
    assert capsys.readouterr().out == ""
    say_there(2, 5, "clips", Path(f"{'long' * 40} [b]"))
    assert capsys.readouterr().out == f"2 of 5 clips are in {'long' * 40} [b] already.\n"
