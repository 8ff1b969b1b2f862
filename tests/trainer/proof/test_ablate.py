"""The ablation table: each variant changes what it names, verdicts follow from the figures alone, and a
stopped one goes on.
"""

import json
import os
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import trainer.proof.ablate
from apt_core.errors import AptError, NotFinite
from apt_core.files.tensorfile import read_tensors
from trainer.config import load_preset
from trainer.machines.account import account
from trainer.proof.ablate import BASE, Ablation, ablation
from trainer.proof.ablation_table import table
from trainer.proof.variants import UPDATES, all_variants, choose
from trainer.proof.verdict import (
    CANNOT_TELL,
    DOES_NOT,
    HOLDS,
    NO_CLAIM,
    difference,
    estimate,
    outcome,
    verdict,
)
from trainer.run.monitor import Monitor

TINY = load_preset(
    Path(__file__).parents[1] / "tiny.toml", ["train.save_every=1", "data.images=16", "data.clips=2"]
)
MINI = load_preset("mini")
NAMES = ("t0", "no_ema", "frozen_backbone")


# The rule.


def by_seed(*values, figure="fd"):
    return {seed: {figure: value} for seed, value in enumerate(values)}


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.seeds == 3
    # t of 2 degrees of freedom at 0.975
    assert found.half == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-5)
    assert estimate([3.0]).half is None and estimate([None, None]) is None


@pytest.mark.parametrize(
    "ours, others, sign, wanted",
    [
        ([5.0, 6.1, 7.2], [1.0, 2.0, 3.0], 1, HOLDS),  # 4.0, 4.1, 4.2, though the seeds lie wide apart
        ([5.0, 6.1, 7.2], [1.0, 2.0, 3.0], -1, DOES_NOT),
        ([1.0, 2.0, 3.0], [5.0, 6.1, 7.2], -1, HOLDS),
        ([9.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1, CANNOT_TELL),  # all from one seed
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1, CANNOT_TELL),
        ([100.0], [1.0], 1, CANNOT_TELL),  # one seed tells nothing of the spread
        ([5.0, None, 7.2], [1.0, 2.0, 3.1], 1, HOLDS),
        ([None, None, None], [1.0, 2.0, 3.0], 1, CANNOT_TELL),
    ],
)
def test_a_test_holds_where_the_interval_of_the_paired_difference_excludes_0(ours, others, sign, wanted):
    assert outcome(difference(by_seed(*ours), by_seed(*others), "fd"), sign) == wanted


def test_two_seeds_that_agree_by_luck_do_not_make_a_share_of_few_samples_certain():
    """The image phase's own rows: head at the last layer alone, 1,024 samples, twice .0107 less structure."""
    ours = {0: {"structure": 0.5313, "fd": 2.55}, 1: {"structure": 0.5488, "fd": 2.56}}
    others = {0: {"structure": 0.542, "fd": 2.5}, 1: {"structure": 0.5595, "fd": 2.51}}
    assert outcome(difference(ours, others, "structure"), -1) == HOLDS
    found = difference(ours, others, "structure", samples=1024)
    # four shares near .55: 1.96 * sqrt(4 * .248 / 1024 / 4)
    assert found.half == pytest.approx(0.0305, abs=2e-4) and outcome(found, -1) == CANNOT_TELL
    assert outcome(difference(ours, others, "structure", samples=100_000), -1) == HOLDS
    assert difference(ours, others, "fd", samples=1024) == difference(ours, others, "fd")  # no share


@pytest.mark.parametrize(
    "outcomes, wanted",
    [
        ([], NO_CLAIM),
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, CANNOT_TELL], CANNOT_TELL),
        ([HOLDS, DOES_NOT], DOES_NOT),
        ([CANNOT_TELL, DOES_NOT], DOES_NOT),
        ([CANNOT_TELL], CANNOT_TELL),
    ],
)
def test_a_claim_needs_all_its_tests(outcomes, wanted):
    assert verdict(outcomes) == wanted


def test_the_table_has_the_rule_applied_and_the_seeds_that_broke_off():
    variants = choose(all_variants(MINI, "paper", "image"), ["no_ar1"])
    figures = {"paper": (2.0, 1.2), "base": (3.0, 0.0), "no_ar1": (9.0, 0.01)}
    rows = {
        name: {
            seed: {
                "figures": {"fd": fd + seed / 10, "d_adversarial": loss, "structure": 0.5 + seed / 100},
                "failed": None,
                "settings": None,
            }
            for seed in range(3)
        }
        for name, (fd, loss) in figures.items()
    }
    rows["no_ar1"][2] = {"figures": {}, "failed": "g_loss became nan", "settings": None}
    made = table(variants, rows)["rows"]
    assert made["no_ar1"]["verdict"] == HOLDS and made["no_ar1"]["failed"] == {"2": "g_loss became nan"}
    assert made["no_ar1"]["figures"]["fd"] == {
        "mean": 9.05,
        "half": pytest.approx(12.7062 * 0.1 / 2, rel=1e-4),
        "seeds": 2,
    }
    assert made["no_ar1"]["difference"]["fd"] == {"mean": 7.0, "half": 0.0, "seeds": 2}
    assert [test["outcome"] for test in made["paper"]["tests"]] == [CANNOT_TELL, CANNOT_TELL] and made[
        "base"
    ]["verdict"] == NO_CLAIM


# The variants.


def changes(name, preset=MINI, phase="image"):
    variants = all_variants(preset, "paper", phase)
    own, changed = variants["paper"].settings.model_dump(), variants[name].settings.model_dump()
    return {key: value for key, value in changed.items() if value != own[key]}


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("no_ar1", {"r1_weight": 0.0}),
        ("t0", {"discriminator_time": 0.0}),
        ("last_layer", {"taps": (1.0,)}),
        ("half_depth", {"taps": (2 / 9, 13 / 36, 0.5)}),
        ("two_thirds_depth", {"taps": (8 / 27, 13 / 27, 2 / 3)}),
        ("frozen_backbone", {"train_backbone": False}),
        ("from_distilled", {"discriminator_start": "start"}),
        ("no_distillation", {}),
        ("batch_quarter", {"batch": 16}),
        ("batch_sixteenth", {"batch": 4}),
        ("no_ema", {}),
        ("sigma_0.02", {"r1_sigma": 0.02}),
        ("sigma_0.06", {"r1_sigma": 0.06}),
        ("sigma_0.6", {"r1_sigma": 0.6}),
        ("no_ar1_long", {"r1_weight": 0.0, "updates": 350}),
        ("updates_50", {"updates": 50}),
        ("updates_350", {"updates": 350}),
        ("steps_4", {}),
    ],
)
def test_a_variant_changes_what_it_names_and_nothing_else(name, wanted):
    found = changes(name)
    assert found.keys() == wanted.keys() and all(
        found[key] == pytest.approx(value) if key == "taps" else found[key] == value
        for key, value in wanted.items()
    )


def test_stable_is_that_recipe_and_a_batch_that_does_not_divide_has_no_row():
    assert all_variants(MINI, "paper", "video")["stable"].settings == MINI.phases("stable").video
    assert "stable" not in all_variants(MINI, "stable", "image")
    assert "batch_quarter" in all_variants(TINY, "paper", "image") and "batch_sixteenth" not in all_variants(
        TINY, "paper", "image"
    )


def test_names_groups_and_what_they_are_compared_with():
    variants = all_variants(MINI, "paper", "image")
    assert list(choose(variants, [])) == list(variants)
    assert list(choose(variants, ["steps_4"])) == ["paper", "base", "steps_1", "steps_2", "steps_4"]
    assert list(choose(variants, ["sigma"])) == ["paper", "base", "sigma_0.02", "sigma_0.06", "sigma_0.6"]
    assert list(choose(variants, ["updates_50"])) == ["paper", "base", "distilled", "updates_50"]
    assert list(choose(variants, ["batch", "t0"])) == [
        "paper",
        "base",
        "t0",
        "batch_quarter",
        "batch_sixteenth",
    ]
    with pytest.raises(
        AptError,
        match=(
            r"there is no variant 'no_r1' \(did you mean no_ar1(, \w+)?( or \w+)?\?\): use paper, base, .* or"
            r" .*\."
        ),
    ) as error:
        choose(variants, ["no_r1"])
    assert "\n" not in str(error.value)


def test_the_other_stage_1_is_that_of_its_recipe_and_costs_as_much():
    variants = all_variants(MINI, "proof", "image")
    dmd, proof = MINI.with_recipe("dmd"), MINI.with_recipe("proof")
    for name in ("distilled_dmd", "stage1_dmd"):
        found = proof.changed(variants[name].stage1, name)
        assert found.distill == dmd.distill and found.data == proof.data
        assert found.distill.method == "dmd" and proof.distill.method == "consistency"
    assert variants["stage1_dmd"].settings == variants["paper"].settings == proof.phases("proof").image
    assert variants["distilled_dmd"].settings is None
    costs = [one.distill.updates * account(one, "distill").flops for one in (dmd, proof)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert list(choose(variants, ["stage1"])) == [
        "paper",
        "base",
        "distilled",
        "distilled_dmd",
        "stage1_dmd",
    ]
    assert not {"distilled_dmd", "stage1_dmd"} & {
        *all_variants(TINY, "paper", "image"),
        *all_variants(MINI, "dmd", "image"),
    }


# All trainings, with the training itself in the place of which the arguments are written down.


def test_every_variant_asks_the_same_function_for_what_it_names(tmp_path, monkeypatch):
    asked = []

    def adversarial(phase, start, base, settings, setup, **options):
        out, keep = setup.out, setup.keep
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("weights")
        state = keep.folder / f"step-{settings.warmup + settings.updates:06d}"
        state.mkdir(parents=True, exist_ok=True)
        (state / "run.json").write_text("{}")
        (state / ".metadata").touch()
        asked.append((out.relative_to(tmp_path).as_posix(), start, base, settings))
        return [
            {"d_adversarial": 100 - update} for update in range(1, settings.warmup + settings.updates + 1)
        ]

    demo = SimpleNamespace(seed=3, metadata=lambda text, kind: {})
    source = SimpleNamespace(
        seed=3,
        demo=demo,
        batches=SimpleNamespace(text_encoder=None),
        start=Path("START"),
        distilled=Path("DISTILLED"),
        fingerprint=lambda: "",
    )
    monkeypatch.setattr(trainer.proof.ablate, "adversarial", adversarial)
    monkeypatch.setattr(Ablation, "_source", lambda self, seed, run: source)
    own = SimpleNamespace(**vars(source) | {"start": Path("OTHER"), "distilled": Path("OTHER DISTILLED")})
    monkeypatch.setattr(Ablation, "_own_stage1", lambda self, variant, source: own)
    judged = {}
    monkeypatch.setattr(
        Ablation,
        "_judged",
        lambda self, variant, source, weights, net, vae: (
            judged.setdefault(variant.name, (weights, variant.column)) and {"fd": 1.0}
        ),
    )
    exported = []
    monkeypatch.setattr(
        trainer.proof.ablate,
        "export",
        lambda source, out, form, dtype, ema: exported.append((out, form, dtype, ema)),
    )
    result = Ablation(tmp_path, MINI, "paper").run(1)
    assert len({folder for folder, *_ in asked}) == len(asked)  # steps and no_ema train nothing of their own
    runs = {folder.split("/")[1]: rest for folder, *rest in asked}
    assert runs.keys() == judged.keys() - {
        "base",
        "distilled",
        "distilled_dmd",
        "no_ema",
        "steps_1",
        "steps_2",
        "steps_4",
    } - {f"updates_{n}" for n in UPDATES} | {"long"}
    assert runs["paper"] == [Path("START"), BASE, MINI.phases("paper").image]
    assert {name for name, (start, *_) in runs.items() if start == BASE} == {"no_distillation"}
    assert runs["stage1_dmd"] == [Path("OTHER"), BASE, MINI.phases("paper").image]
    assert {name for name, (start, *_) in runs.items() if start == Path("OTHER")} == {"stage1_dmd"}
    assert judged["distilled_dmd"] == (Path("OTHER DISTILLED"), "distilled_1")
    assert all(base == BASE for _, base, _ in runs.values())
    assert [
        settings.updates for folder, *_, settings in asked if folder.startswith("trainings/long/")
    ] == list(UPDATES)
    assert judged["updates_100"] == (tmp_path / "trainings/long/seed-3/updates-000100.safetensors", "apt_1")
    assert judged["steps_4"] == (tmp_path / "trainings/paper/seed-3/updates-000075.safetensors", "apt_4")
    assert judged["base"] == (Path("DISTILLED"), "base_25_cfg") and judged["distilled"] == (
        Path("DISTILLED"),
        "distilled_1",
    )
    assert (
        exported == [(tmp_path / "trainings/paper/seed-3/raw.safetensors", "file", "fp32", 0.0)]
        and judged["no_ema"][0] == exported[0][0]
    )
    # The last tenth of 75 updates is 69 to 75, and of 50 it is 46 to 50.
    assert result["rows"]["paper"]["figures"]["d_adversarial"]["mean"] == pytest.approx(100 - 72)
    assert result["rows"]["updates_50"]["figures"]["d_adversarial"]["mean"] == pytest.approx(100 - 48)


# Real ones, as small as they get.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("ablations")
    return out, Ablation(out, TINY, "paper", samples=4).run(2, NAMES, "the command")


def test_the_table_its_page_and_its_chart(made):
    out, result = made
    assert json.loads((out / "ablations.json").read_text()) == result
    assert (
        list(result["rows"]) == ["paper", "base", "t0", "frozen_backbone", "no_ema"]
        and result["seeds"] == [0, 1]
        and result["command"] == "the command"
    )
    for name, row in result["rows"].items():
        one, other = (
            json.loads((out / "results" / f"{name}-seed-{seed}.json").read_text())["figures"]
            for seed in (0, 1)
        )
        assert row["by_seed"] == {"0": one, "1": other} and one != other
        assert row["figures"]["fd"]["mean"] == pytest.approx((one["fd"] + other["fd"]) / 2, abs=1e-6)
        # the six digits of t
        assert row["figures"]["fd"]["half"] == pytest.approx(
            12.7062 * abs(one["fd"] - other["fd"]) / 2, rel=1e-5
        )
        assert row["verdict"] == (
            NO_CLAIM if name == "base" else verdict([test["outcome"] for test in row["tests"]])
        )
    # An update at a time the two are the same, but for the discriminator's time.
    assert result["rows"]["t0"]["difference"]["d_adversarial"]["mean"] != 0
    page = (out / "ablations.html").read_text()
    HTMLParser().feed(page)
    assert (
        "http" not in page.replace("http-equiv", "")
        and "t = 0 as the discriminator&#x27;s timestep collapses" in page
        and "data:image/png;base64," in page
    )
    with Image.open(out / "ablations.png") as picture:
        assert picture.width > 1500


def test_raw_weights_are_those_of_the_last_state(made):
    out, _ = made
    folder = out / "trainings" / "paper" / "seed-0"
    average, raw, start = (
        read_tensors(path)[0]
        for path in (
            folder / "updates-000002.safetensors",
            folder / "raw.safetensors",
            out / "runs" / "seed-0" / "distilled.safetensors",
        )
    )
    name = "blocks.0.self_attn.q.weight"
    moved, moved_on_average = raw[name] - start[name], average[name] - start[name]
    # After two steps d of RMSProp and a decay of 0.9 the average is 0.1 (0.9 d1 + d1 + d2) from the start,
    # the weights d1 + d2.
    assert 1e-4 < moved.abs().max() < 4e-4 and moved_on_average.abs().max() < 0.2 * 2e-4 + 1e-6


def test_a_finished_one_trains_and_judges_nothing_again_and_a_lost_row_is_made_again(
    made, tmp_path, monkeypatch
):
    out = tmp_path / "again"
    shutil.copytree(made[0], out)
    (out / "results" / "no_ema-seed-1.json").unlink()
    monkeypatch.setattr(trainer.proof.ablate, "adversarial", None)
    judged, whole = [], Ablation._judged
    monkeypatch.setattr(
        Ablation,
        "_judged",
        lambda self, variant, source, *rest: (
            judged.append((variant.name, source.seed)) or whole(self, variant, source, *rest)
        ),
    )
    assert Ablation(out, TINY, "paper", samples=4).run(2, NAMES, "the command") == made[1] and judged == [
        ("no_ema", 1)
    ]
    (out / "results" / "no_ema-seed-1.json").write_text("{")
    with pytest.raises(AptError, match="no_ema-seed-1.json is damaged: delete it, and it is made again."):
        Ablation(out, TINY, "paper", samples=4).run(2, NAMES)
    with pytest.raises(
        AptError, match=r"again holds an ablation with another samples \(4, now 5\): give another --out"
    ):
        Ablation(out, TINY, "paper", samples=5).run(2, NAMES)


def test_rows_of_an_earlier_table_are_taken_over(made, tmp_path, monkeypatch):
    for name in ("Demo", "adversarial", "evaluate"):
        monkeypatch.setattr(trainer.proof.ablate, name, None)
    earlier = made[0] / "ablations.json"
    result = Ablation(tmp_path / "out", TINY, "paper", samples=4, tables=(earlier,)).run(
        2, NAMES, "the command"
    )
    assert {**result, "machine": None} == {**made[1], "machine": None} and result["sources"].keys() == {
        "0",
        "1",
    }
    # A row with other settings, or of another seed, is not.
    other = json.loads(earlier.read_text())
    other["rows"]["t0"]["settings"]["lr_generator"] *= 2
    (tmp_path / "other.json").write_text(json.dumps(other))
    one = Ablation(tmp_path / "others", TINY, "paper", samples=4, tables=(tmp_path / "other.json",))
    with pytest.raises(TypeError, match="NoneType"):
        one.run(2, NAMES)
    assert not list((tmp_path / "others" / "results").glob("t0*"))
    assert len(list((tmp_path / "others" / "results").glob("*"))) == 8


def test_another_stage_1_is_a_row_of_its_own_and_goes_on_in_an_ablation_of_before(
    made, tmp_path, monkeypatch
):
    """In the folder of an ablation whose preset had no such recipe; `made` is one."""
    also = {"distill.method": "dmd", "distill.updates": 2, "distill.fake_updates": 1, "train.lora_rank": 2}
    other = TINY.phases("paper").model_copy(update={"also": also})
    preset, out = TINY.model_copy(update={"stage2": TINY.stage2 | {"dmd": other}}), tmp_path / "again"
    shutil.copytree(made[0], out)
    earlier = out / "results" / "paper-seed-0.json"  # of a version whose stage 2 had fewer settings
    row = json.loads(earlier.read_text())
    del row["settings"]["train_backbone"]
    earlier.write_text(json.dumps(row))
    result = Ablation(out, preset, "paper", samples=4).run(1, ["stage1"])
    rows = result["rows"]
    assert list(rows) == ["paper", "base", "distilled", "distilled_dmd", "stage1_dmd"]
    assert rows["paper"]["by_seed"] == {"0": made[1]["rows"]["paper"]["by_seed"]["0"]}
    assert rows["distilled_dmd"]["stage1"] == rows["stage1_dmd"]["stage1"] == also
    assert "stage1" not in rows["distilled"] and rows["distilled_dmd"]["verdict"] == NO_CLAIM
    for one, another in (("distilled_dmd", "distilled"), ("stage1_dmd", "paper")):
        assert rows[one]["figures"]["fd"] != rows[another]["figures"]["fd"]
    weights = read_tensors(out / "trainings" / "distilled_dmd" / "seed-0" / "distilled.safetensors")[0]
    usual = read_tensors(out / "runs" / "seed-0" / "distilled.safetensors")[0]
    assert any(not torch.equal(value, usual[name]) for name, value in weights.items())
    assert not (out / "trainings" / "distilled_dmd" / "seed-0" / "latents").exists()  # the samples are shared
    # The rows are taken over by an ablation with the same stage 1, and by no other.
    for name in ("run_distill", "adversarial", "evaluate"):
        monkeypatch.setattr(trainer.proof.ablate, name, None)
    tables = (out / "ablations.json",)
    again = Ablation(tmp_path / "new", preset, "paper", samples=4, tables=tables).run(1, ["stage1"])
    rows["paper"]["settings"]["train_backbone"] = True
    assert again["rows"] == rows
    changed = other.model_copy(update={"also": also | {"distill.updates": 3}})
    preset = preset.model_copy(update={"stage2": preset.stage2 | {"dmd": changed}})
    with pytest.raises(AptError, match="with another source"):  # it would make that row on its own samples
        Ablation(tmp_path / "newer", preset, "paper", samples=4, tables=tables).run(1, ["stage1"])
    assert not list((tmp_path / "newer" / "results").glob("*dmd*"))
    for _ in ("rows and weights", "weights alone"):
        with pytest.raises(AptError, match="again holds an ablation with another stage1: give another --out"):
            Ablation(out, preset, "paper", samples=4).run(1, ["stage1"])
        for path in (out / "results").glob("*_dmd-seed-0.json"):
            path.unlink()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "table.json is damaged"),
        ("{}", "table.json is not the ablations.json of an ablation: give one that is."),
        ('{"settings": {"preset": 3}, "rows": {}}', "is not the ablations.json of an ablation"),
        (None, "table.json is a table with another samples than this ablation has: leave it out"),
    ],
)
def test_a_table_that_does_not_belong_here_is_one_sentence(made, tmp_path, text, message):
    (tmp_path / "table.json").write_text(text or (made[0] / "ablations.json").read_text())
    with pytest.raises(AptError, match=message) as error:
        Ablation(tmp_path / "out", TINY, "paper", samples=5, tables=(tmp_path / "table.json",)).run(2, NAMES)
    assert "\n" not in str(error.value)


def finished(made, tmp_path):
    """What a finished demo of the same preset and seed 1 would have left, as far as anybody here reads it."""
    run = tmp_path / "demo"
    shutil.copytree(made[0] / "runs" / "seed-1", run)
    for name in ("apt-image", "apt-tiny"):
        shutil.copy(run / "distilled.safetensors", run / f"{name}.safetensors")
    return run


def test_a_training_that_is_stopped_goes_on_on_the_run_that_is_given(made, tmp_path, monkeypatch):
    run, out, updates = finished(made, tmp_path), tmp_path / "out", []

    class Stopped(Monitor):
        def __call__(self, done, total, row):
            super().__call__(done, total, row)
            updates.append(done)
            if updates == [1]:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.proof.ablate, "Monitor", Stopped)
    one = ablation(out, None, None, "image", 4, [run], "cpu")
    with pytest.raises(SystemExit) as stop:
        one.run(1, ["t0"])
    assert stop.value.code == 0 and not list((out / "results").glob("paper*"))
    result = one.run(1, ["t0"])
    assert updates == [1, 2, 1, 2] and result["seeds"] == [1] and not (out / "runs").exists()
    for name in ("paper", "base", "t0"):
        assert result["rows"][name]["by_seed"]["1"] == made[1]["rows"][name]["by_seed"]["1"]
        assert result["rows"][name]["verdict"] == (NO_CLAIM if name == "base" else CANNOT_TELL)


def test_runs_that_cannot_be_used_are_one_sentence(made, tmp_path):
    run = finished(made, tmp_path)
    with pytest.raises(AptError, match="nowhere holds no run of the demo"):
        ablation(tmp_path / "out", None, None, "image", 4, [tmp_path / "nowhere"], "cpu")
    with pytest.raises(AptError, match="are both of seed 1: give runs of different seeds."):
        Ablation(tmp_path / "out", TINY, "paper", runs=(run, run)).run(2, ["t0"])
    other = TINY.model_copy(update={"distill": TINY.distill.model_copy(update={"updates": 4})})
    with pytest.raises(
        AptError,
        match="demo was made with another distill than recipe paper of tiny has: give a run of that recipe.",
    ):
        Ablation(tmp_path / "out", other, "paper", runs=(run,)).run(2, ["t0"])
    with pytest.raises(AptError, match="no recipe 'wild': use one of paper, stable"):
        ablation(tmp_path / "out", None, "wild", "image", 4, [run], "cpu")
    (run / "apt-tiny.safetensors").unlink()
    with pytest.raises(AptError, match="demo has no apt-tiny.safetensors; let the demo finish there first."):
        ablation(tmp_path / "out", None, None, "image", 4, [run], "cpu")
    assert not (tmp_path / "out").exists()


def test_a_training_that_breaks_off_is_a_row_that_says_so(made, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(made[0], out)

    def broken(*args, **options):
        raise NotFinite("g_loss of the generator became nan")

    monkeypatch.setattr(trainer.proof.ablate, "adversarial", broken)
    row = Ablation(out, TINY, "paper", samples=4).run(2, ["no_distillation"])["rows"]["no_distillation"]
    assert row["failed"] == {
        "0": "g_loss of the generator became nan",
        "1": "g_loss of the generator became nan",
    }
    assert (
        row["verdict"] == CANNOT_TELL
        and row["figures"] == {}
        and "broke off: g_loss" in (out / "ablations.html").read_text()
    )
