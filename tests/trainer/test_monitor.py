"""What a run says while it trains: a table that survives interruptions, speeds, and the warning before a
collapse.
"""

import csv

import pytest

import trainer.run.monitor
from trainer.run.monitor import CollapseWarning, Monitor, Work


@pytest.fixture
def clock(monkeypatch):
    """Two seconds between any two looks at it, and no writer but the CSV file."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(trainer.run.monitor.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(trainer.run.monitor, "find_spec", lambda name: None)


def table(folder):
    with (folder / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_with_columns_that_come_later_and_speeds(clock, tmp_path):
    seen = []
    with Monitor(
        tmp_path, Work(samples=8, flops=6e12, peak=4e12), forward=lambda *args: seen.append(args)
    ) as monitor:
        monitor(1, 3, {"d_loss": 1.5})
        monitor(2, 3, {"d_loss": 1.25, "g_loss": 0.1})
        monitor(3, 3, {"d_loss": 1.0, "g_loss": 1 / 3})
    rows = table(tmp_path)
    assert [row["update"] for row in rows] == [1, 2, 3] and [row["d_loss"] for row in rows] == [
        1.5,
        1.25,
        1.0,
    ]
    assert "g_loss" not in rows[0] and rows[2]["g_loss"] == 1 / 3
    assert "seconds" not in rows[0] and all(row["memory_gib"] > 0 for row in rows)
    assert [(row["seconds"], row["samples_per_second"], row["mfu"]) for row in rows[1:]] == [
        (2.0, 4.0, 0.75)
    ] * 2
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)] and seen[1][2][
        "g_loss"
    ] == 0.1


def test_a_resumed_run_replaces_the_rows_that_it_does_again(clock, tmp_path):
    with Monitor(tmp_path) as monitor:
        for update in (1, 2, 3, 4):
            monitor(update, 6, {"loss": float(update)})
    with Monitor(tmp_path) as monitor:  # the last state was of update 2
        for update in (3, 4, 5):
            monitor(update, 6, {"loss": 10.0 * update, "other": 1.0})
    rows = table(tmp_path)
    assert [(row["update"], row["loss"]) for row in rows] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
        (5, 50.0),
    ]
    assert [("other" in row) for row in rows] == [False, False, True, True, True]


def test_one_warning_when_the_discriminator_wins_and_another_when_it_wins_again(capsys, clock, tmp_path):
    warning = CollapseWarning(1.386)
    losses = [1.3] * 20 + [0.01] * 60 + [1.0] * 20 + [0.01] * 60
    rows = [{"d_adversarial": loss, "logit_real": 4.0, "logit_fake": -3.0} for loss in losses]
    messages = {done: message for done, row in enumerate(rows) if (message := warning.see(done, row))}
    first, second = messages
    assert 20 < first < 60 and 100 < second < 140  # before the smoothed loss is gone, and once each
    assert (
        messages[first].startswith(f"update {first}: the discriminator's loss heads for zero (0.1")
        and "logits 7.0 apart" in messages[first]
    )
    assert warning.see(0, {"cd_loss_image": 1.0}) is None
    with Monitor(tmp_path, relativistic=True) as monitor:
        for update in range(1, 60):
            monitor(update, 60, {"d_adversarial": 0.0, "logit_real": 1.0, "logit_fake": -1.0})
    assert " ".join(capsys.readouterr().out.split()).count("0.69 is a draw") == 1


def test_tensorboard_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(tmp_path) as monitor:
        monitor(7, 9, {"d_loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("d_loss")] == [(7, 0.5)]


ROW = {"d_loss": 1.0, "g_loss": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "update,d_loss\n1,\x00\n2,x\x00",
        "update,d_loss\nfirst,1\n",
        "d_loss\n1\n",
        "update,d_loss\n1,2,3,4\n",
        "update,d_loss\n5,1\n2,1\n",
        "\ufeff\xff",
    ],
)
def test_a_log_of_somebody_elses_hand_is_put_aside(text, tmp_path, capsys):
    (tmp_path / "history.csv").write_text(text, encoding="utf-8")
    with Monitor(tmp_path) as monitor:
        monitor(6, 10, ROW)
    assert (tmp_path / "history-damaged.csv").read_text(
        encoding="utf-8"
    ) == text and "history-damaged.csv" in capsys.readouterr().err
    assert [row["update"] for row in csv.DictReader((tmp_path / "history.csv").open(encoding="utf-8"))] == [
        "6"
    ]


@pytest.mark.parametrize("broken", ["csv", "board", "display"])
def test_what_stands_beside_a_training_does_not_end_it(broken, tmp_path, capsys, monkeypatch):
    """It is said once, and the others go on."""

    def fail(*args, **kwargs):
        raise {
            "csv": OSError(28, "No space left on device"),
            "board": RuntimeError("a queue is full"),
            "display": UnicodeEncodeError("ascii", "λ", 0, 1, "no"),
        }[broken]

    seen = []
    with Monitor(
        tmp_path, forward=fail if broken == "display" else lambda *args: seen.append(args)
    ) as monitor:
        monitor(1, 3, ROW)
        if broken == "csv":
            monkeypatch.setattr(monitor, "_write", fail)
        elif broken == "board":
            monkeypatch.setattr(monitor._board, "add_scalar", fail)
        monitor(2, 3, ROW)
        monitor(3, 3, ROW)
    said = capsys.readouterr().err
    assert said.count("the training goes on without") == 1 and said.count("warning") == 1
    rows = list(csv.DictReader((tmp_path / "history.csv").open(encoding="utf-8")))
    assert len(rows) == (1 if broken == "csv" else 3) and len(seen) == (0 if broken == "display" else 3)
