"""The benchmarks in miniature, and the counts that their floors stand on."""

import json
import time
from pathlib import Path

import pytest
import torch
from commands import done

from apt_core.errors import AptError
from trainer.bench.floors import count_work
from trainer.bench.many import model_of_many
from trainer.bench.rates import Rates, peak_memory
from trainer.bench.shapes import find_shapes
from trainer.config import load_preset
from trainer.machines.account import account
from trainer.machines.counts import sizes_of

PARTS = ("text", "dit", "vae", "total")
CPU = torch.device("cpu")


def bench(*arguments) -> str:
    torch.set_num_threads(1)
    return done("bench", *arguments)


def test_inference_in_miniature(tmp_path):
    shown = bench("inference", "--repeats", 2, "--json", tmp_path / "a.json", "--device", "cpu")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    # Not that the engine takes longer than its floor: on a busy machine the rates that the floor stands on
    # may have been measured in a bad moment.
    for part in ("dit", "vae"):
        work = found["work"][part]
        assert (
            found["floor"][part]
            == max(work["flops"] / found["rates"]["matrix"], work["bytes"] / found["rates"]["copy"])
            > 0
            < found["seconds"][part]
        )
    assert found["floor"]["total"] == pytest.approx(sum(found["floor"][part] for part in PARTS[:3]))
    assert set(found["stock"]) == set(PARTS) and found["paper"]["total"] == 6.03
    # a decode that keeps less than one frame more than it gives out would be a broken ruler
    assert all(size > 48 * 48 * 3 for size in found["decode_peak_bytes"].values())
    # null: equal to the last digit
    assert (
        found["velocity_error"] < 1e-5
        and found["decode_psnr"]["engine"] > 100
        and (found["decode_psnr"]["stock"] or float("inf")) > 100
    )
    assert found["uncompiled_decode_seconds"] is None and all(
        found["first_seconds"][part] > 0 for part in ("dit", "vae")
    )
    assert "A MODEL of several such GPUs" in shown and "not a measurement" in shown and "table 7" in shown
    assert set(found["modelled_seconds_on_gpus"]) == {"1", "2", "4"}  # 4 heads


def test_inference_in_fp8_says_how_far_it_is_off(tmp_path):
    shown = bench("inference", "--fp8", "--repeats", 1, "--json", tmp_path / "a.json", "--device", "cpu")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (
        0.01 < found["velocity_error"] < 0.08
        and f"Velocity in fp8: {found['velocity_error']:.1e} from diffusers in float32" in shown
    )
    dit = found["work"]["dit"]
    assert found["floor"]["dit"] == max(
        dit["flops"] / found["rates"]["matrix_fp8"], dit["bytes"] / found["rates"]["copy"]
    )


def test_training_in_miniature(tmp_path):
    shown = bench("train", "mini", "frames=5", "--updates", 2, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    preset = load_preset("mini", ["frames=5", "stage2.demo.video.batch=1"], ("data",))
    assert found["batch"] == 1 and set(found["modes"]) == {"full", "lora"}
    full, lora = (found["modes"][mode] for mode in ("full", "lora"))
    adapted = preset.model_copy(update={"train": preset.train.model_copy(update={"mode": "lora"})})
    assert full["flops"] == account(preset, "video").flops
    # A LoRA of rank 64 on layers of width 128 costs more than it spares.
    assert lora["flops"] == account(adapted, "video").flops > full["flops"]
    for row in (full, lora):
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["seconds_of_whole_batch"] == pytest.approx(found["whole_batch"] * row["seconds"])
        assert (
            row["share_of_peak"] == pytest.approx(row["flops_per_second"] / found["peak_flops"])
            and row["seconds"] > 0 < row["account_bytes"]
        )
    assert "s / update" in shown and not (tmp_path / "random").exists()


@pytest.mark.parametrize(
    "given, frames, head_width, batch, whole",
    [
        ((), 17, 32, 1, 6),
        (("--recipe", "other"), 9, None, 1, 4),
        (("frames=5", "microbatch=2"), 5, 32, 2, 6),
        (("batch=3",), 17, 32, 3, 3),
        (("--recipe", "other", "batch=3"), 9, None, 3, 3),
    ],
)
def test_training_is_timed_with_what_a_recipe_changes_elsewhere_and_then_the_command_line(
    given, frames, head_width, batch, whole, tmp_path, monkeypatch
):
    tiny = (Path(__file__).parent / "tiny.toml").read_text(encoding="utf-8")
    also = '[stage2.paper.also]\n"data.frames" = 17\n"train.head_width" = 32\n'
    first, phase, video = tiny.partition("[stage2.paper.video]")
    own = tiny.partition("[stage2.stable.image]")[2].replace("stable", "other")
    preset = f"{first}{phase}{video.replace('batch = 4', 'batch = 6', 1)}{also}[stage2.other.image]{own}"
    (tmp_path / "also.toml").write_text(preset, encoding="utf-8")
    seen = []

    def measure(preset, recipe, phase, *rest):
        seen.append((preset.data.frames, preset.train.head_width, preset.phase(phase, recipe).batch))
        zeros = ("seconds", "flops_per_second", "share_of_peak", "peak_bytes", "account_bytes")
        return dict.fromkeys(zeros, 0.0)

    monkeypatch.setattr("trainer.bench.train._measure", measure)
    shown = bench("train", tmp_path / "also.toml", *given, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert seen == [(frames, head_width, batch)] * 2
    recipe = "other" if "other" in given else "paper"
    assert (found["batch"], found["whole_batch"], found["recipe"]) == (batch, whole, recipe)
    assert shown.startswith(f"tiny/{recipe}, videos, batch {batch}")


def test_work_is_what_the_shapes_say():
    work = count_work(find_shapes("mini"), 4, 32)
    model = load_preset("mini").model
    n, d = 3 * 3 * 3, model.width
    linear = model.layers * (n * (12 * d * d + 4 * d * model.ffn) + 32 * 4 * d * d)
    assert work["dit"].flops == linear + model.layers * 4 * d * (n * n + n * 32)
    # weights, noise in, velocity out
    assert work["dit"].moved == 4 * (sizes_of(model).body + 2 * 16 * 3 * 6 * 6)
    assert work["vae"].flops > 20 * work["dit"].flops  # the decode is where the work is


def test_a_floor_is_the_slower_of_products_and_copies():
    rates = Rates(matrix=100.0, copy=10.0)
    assert (rates.floor(1000, 10), rates.floor(100, 50)) == (10, 5)
    assert Rates(matrix=100.0, copy=10.0, matrix_fp8=200.0).floor(1000, 10, eight=True) == 5


def test_peak_memory_sees_what_is_gone_again():
    with peak_memory(CPU) as peak:
        held, deadline = torch.ones(2**24), time.monotonic() + 600
        while peak.bytes < 60 * 2**20 and time.monotonic() < deadline:  # whoever looks may wait for a core
            time.sleep(0.001)
        del held
    assert 60 * 2**20 < peak.bytes < 200 * 2**20


def test_the_model_of_many_divides_what_divides(monkeypatch):
    shapes = find_shapes("mini")
    many = model_of_many(shapes, {"text": 1.0, "dit": 8.0, "vae": 4.0})
    assert many[1]["text"] == 1 and many[1]["dit"] == 8 and many[1]["vae"] == pytest.approx(4, abs=1e-4)
    for gpus in (2, 4):
        assert many[gpus]["text"] == 1
        assert (
            8 / gpus < many[gpus]["dit"] < 8 / gpus + 0.01 and 4 / gpus < many[gpus]["vae"] < 4 / gpus + 0.05
        )
        assert many[gpus]["total"] == pytest.approx(sum(many[gpus][part] for part in PARTS[:3]))


def test_a_model_that_is_not_known_is_a_sentence():
    with pytest.raises(
        AptError, match="there is no model 'wan3' in the benchmark: use one of mini, wan2.2-5b"
    ):
        find_shapes("wan3")
