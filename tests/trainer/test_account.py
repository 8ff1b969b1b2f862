"""The account against what is known: true parameter counts, published FLOPs, and the memory of measured
parts.
"""

from pathlib import Path

import pytest

from apt_core.errors import AptError
from trainer.config import PRESETS, load_preset
from trainer.jobs.plan import make_plan
from trainer.machines.account import account, summary
from trainer.machines.counts import cost, counts_of, head_parameters, sizes_of, tokens
from trainer.machines.machine import GIB, imagined

DOCS = PRESETS.parents[1] / "docs"
REAL = sorted(path.stem for path in PRESETS.glob("*.toml") if path.stem != "mini")


def preset(name, *overrides):
    return load_preset(name, overrides, ("train", "data", "distill"))


def fitting(one, stage, recipe, machine):
    """The account of a plan for such a machine, on which it fits."""
    plan = make_plan(one, stage, Path("run"), recipe=recipe, dry_run=True, machine=machine)
    plan.check_fit()
    return plan.account


@pytest.mark.parametrize(
    "name, count, block",
    [
        ("wan2.1-1.3b-480p", 1_418_996_800, 46.44e6),
        ("wan2.1-14b", 14_288_491_584, 351.4e6),
        ("wan2.2-5b", 4_999_787_712, 163.7e6),
        ("seaweed-8b", 8_019_454_872, 224.4e6),
    ],
)
def test_parameters_are_those_of_the_released_models(name, count, block):
    model = preset(name).model
    assert sizes_of(model).body == count
    assert counts_of(model).block(model) == pytest.approx(block, rel=1e-3)


def test_parameters_are_those_of_what_we_build():
    import torch

    from apt_core.method.discriminator import Discriminator
    from apt_core.models.wan import WanBackbone

    model = preset("mini").model
    with torch.device("meta"):
        wan = WanBackbone(
            num_attention_heads=model.heads,
            attention_head_dim=model.head_dim,
            text_dim=model.text_dim,
            ffn_dim=model.ffn,
            num_layers=model.layers,
        )
        count = sum(p.numel() for p in wan.parameters())
        discriminator = Discriminator(wan)
    assert sizes_of(model).body == count
    assert account(preset("mini"), "image").parameters["discriminator's heads"] == head_parameters(
        model, model.width
    )
    built = sum(p.numel() for p in discriminator.parameters()) - sum(
        p.numel() for p in discriminator.backbone.parameters()
    )
    assert head_parameters(model, model.width) == built
    assert account(preset("mini"), "image").parameters["discriminator"] == sum(
        p.numel() for p in discriminator.backbone.parameters()
    )


@pytest.mark.parametrize("taps", [(1.0,), (1 / 4, 1 / 2), (8 / 27, 13 / 27, 2 / 3)])
def test_a_discriminator_of_less_depth_has_the_parameters_of_what_we_build(taps):
    import torch

    from apt_core.method.discriminator import Discriminator
    from trainer.bench.shapes import build_backbone

    one = preset("mini", f"stage2.paper.image.taps={list(taps)}", "head_width=64")
    with torch.device("meta"):
        discriminator = Discriminator(
            build_backbone(one.model, torch.device("meta"), torch.float32), taps, 2, 64
        )
    found = account(one, "image", "paper").parameters
    assert found["discriminator's heads"] == sum(
        p.numel() for name, p in discriminator.named_parameters() if not name.startswith("backbone.")
    )
    assert found["discriminator"] == sum(p.numel() for p in discriminator.backbone.parameters())


@pytest.mark.parametrize("taps", [(4 / 9, 13 / 18, 1.0), (0.5,)])
def test_an_mmdits_discriminator_has_no_output_head(taps):
    """Nor its modulation, and its last block no text of its own: the parameters of what we build."""
    import torch

    from trainer.bench.shapes import build_backbone
    from trainer.stages.networks import make_discriminator

    one = preset("seaweed-8b", f"stage2.paper.video.taps={list(taps)}", "context_parallel=1")
    backbone = build_backbone(one.model, torch.device("meta"), torch.float32)
    found = account(one, "video", "paper").parameters
    assert found["generator"] == sum(p.numel() for p in backbone.parameters())
    with torch.device("meta"):
        built = make_discriminator(backbone, taps, one.train.head_width)
    assert found["discriminator"] == sum(p.numel() for p in built.backbone.parameters())


def test_less_depth_and_a_still_backbone_cost_less():
    whole, half = (
        account(preset("wan2.1-1.3b-480p", f"stage2.paper.video.taps={taps}"), "video", "paper")
        for taps in ("[1.0]", "[0.5]")
    )
    still = account(
        preset(
            "wan2.1-1.3b-480p", "stage2.paper.video.taps=[1.0]", "stage2.paper.video.train_backbone=false"
        ),
        "video",
        "paper",
    )
    one, n = preset("wan2.1-1.3b-480p"), tokens(preset("wan2.1-1.3b-480p"), "video")
    linear, attention = counts_of(one.model).forward(one.model, n)
    outer = counts_of(one.model).outer_forward(one.model, n)
    head = 4 * n * one.model.width * (one.model.width + 1)  # back to its input
    # Three passes of the discriminator are not run again and not back.
    spared = 3 * linear + 3.5 * attention + outer + head
    assert whole.memory["optimizer"] - still.memory["optimizer"] == 4 * whole.parameters["discriminator"]
    assert whole.memory["weights (fp32)"] == still.memory["weights (fp32)"]
    assert half.flops < whole.flops and whole.flops - still.flops == pytest.approx(
        2048 * 3 * spared, rel=1e-6
    )
    model = preset("wan2.1-1.3b-480p").model
    assert whole.parameters["discriminator"] - half.parameters["discriminator"] == 15 * counts_of(
        model
    ).block(model)


@pytest.mark.parametrize(
    "name, n, teraflop",
    [
        ("wan2.1-1.3b-480p", 20280, 128.6),
        ("wan2.1-1.3b-720p", 46800, 525),
        ("wan2.2-5b", 11440, 150),
        ("wan2.1-14b", 46800, 2935),
        ("seaweed-8b", 46800, 1059),
    ],
)
def test_one_forward_pass(name, n, teraflop):
    one = preset(name)
    assert tokens(one, "video") == n
    assert sum(counts_of(one.model).forward(one.model, n)) / 1e12 == pytest.approx(teraflop, rel=0.003)


@pytest.mark.parametrize(
    "name, teraflop", [("wan2.1-1.3b-480p", 2649), ("wan2.2-5b", 3057), ("wan2.1-14b", 60512)]
)
def test_one_sample_of_stage_2(name, teraflop):
    """13 F of the discriminator's step and 7.1 to 7.8 F of the generator's; then the scores that attention
    computes again in five backward passes, and the heads in three passes and back, and in one and back to its
    input.
    """
    one = preset(name, "context_parallel=1", "stage2.paper.video.discriminator_step=batched")
    n = tokens(one, "video")
    heads = 3 * 4 * n * (one.train.head_width or one.model.width) * one.model.width
    more = 5 * 0.5 * counts_of(one.model).forward(one.model, n)[1] + (3 * 3 + 2) * heads
    assert account(one, "video", "paper").flops / 2048 == pytest.approx(teraflop * 1e12 + more, rel=0.01)
    two_pass = (
        account(preset(name, "context_parallel=1"), "video", "paper").flops
        - account(one, "video", "paper").flops
    )
    outer = counts_of(one.model).outer_forward(one.model, n)
    once_more = sum(counts_of(one.model).forward(one.model, n)) + outer + heads
    assert two_pass == pytest.approx(2048 * 3 * once_more, rel=1e-4)


def test_stage_1_is_seven_forward_passes():
    """And the student's attention scores once more in its backward pass."""
    one = preset("wan2.1-1.3b-480p", "video_share=1.0")
    again = 0.5 * counts_of(one.model).forward(one.model, tokens(one, "video"))[1]
    assert account(one, "distill").flops == pytest.approx(32 * (7 * 128.6e12 + again), rel=0.003)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_dmd_has_one_frozen_base_and_a_small_fake_score(mode):
    """In bytes a parameter: 12 of weights and Adam's state of what is trained, 4 of each of three averages,
    4 of the larger gradient; no second whole network beside a whole generator.
    """
    one = preset("wan2.1-1.3b-480p", "distill.method=dmd", f"train.mode={mode}")
    found, base = account(one, "distill"), sizes_of(one.model).body
    adapter = found.parameters["fake score's LoRA"]
    trained = found.parameters["generator's LoRA" if mode == "lora" else "generator"]
    assert found.parameters["base"] == base and trained == (adapter if mode == "lora" else base)
    states = sum(found.memory[kind] for kind in ("weights (fp32)", "optimizer", "averages", "gradients"))
    assert states == 12 * (trained + adapter) + 3 * 4 * trained + 4 * trained
    assert 2 * base < found.memory["frozen base"] < 2.1 * base  # bf16, but for what stays fp32
    consistency = account(preset("wan2.1-1.3b-480p", f"train.mode={mode}"), "distill").bytes
    assert (found.bytes < consistency) == (
        mode == "full"
    )  # a LoRA's fake score has an optimizer, a target none


def test_an_update_of_dmd_is_31_forward_passes():
    """Of five fake updates, each a sample, a pass, its recomputation and the way back to its input; then as
    much of the generator's, and three looks at its sample. Adapters, and attention's scores once more, come
    on top.
    """
    one = preset("wan2.1-1.3b-480p", "distill.method=dmd", "train.mode=lora", "video_share=1.0")
    forward = sum(counts_of(one.model).forward(one.model, tokens(one, "video")))
    passes = account(one, "distill").flops / one.distill.batch_video / forward
    alone = 5 * (1 + 3) + 3 + 3
    assert alone < passes < 1.25 * alone


def test_hours_have_the_warm_up():
    """20 updates of the discriminator alone before 200 of both."""
    short, long = (
        account(preset("wan2.1-1.3b-480p", f"stage2.budget.video.warmup={n}"), "video", "budget")
        for n in (0, 20)
    )
    assert short.warmup == 0 and short.flops == long.flops
    assert 0.5 < long.warmup / (20 * long.flops) < 0.8  # the discriminator's share of an update
    assert long.gpu_hours(4e14) - short.gpu_hours(4e14) == pytest.approx(long.warmup / 4e14 / 3600, rel=1e-9)


@pytest.mark.parametrize("name, gib", [("wan2.1-1.3b-480p", 24), ("wan2.2-5b", 32)])
def test_a_weekend_is_48_hours_on_one_card(name, gib):
    one = preset(name).with_recipe("weekend")
    assert one.train.mode == "lora" and one.data.frames == 33
    card = imagined(1, gib, 165)
    needed = [fitting(one, phase, "weekend", card) for phase in ("image", "video")]
    assert 24 < sum(each.gpu_hours(card.speed) for each in needed) <= 48
    assert (
        max(each.bytes for each in needed) <= 0.8 * gib * GIB
    )  # nobody has run it: room for what is not counted


@pytest.mark.parametrize(
    "name, label, more",
    [
        ("wan2.1-1.3b-480p", "`wan2.1-1.3b-480p` | 150 updates of 64 | 200 updates of 32", []),
        ("wan2.2-5b", "`wan2.2-5b` | 100 updates of 64 | 180 updates of 32", []),
        ("wan2.2-5b", "the same with `head_width=1024` | |", ["head_width=1024"]),
    ],
)
def test_what_the_walk_says_of_a_weekend(name, label, more):
    """On one card of 24 GB it fits, within 48 hours; what an RTX 5090 and an H100 take."""
    one = preset(name).with_recipe("weekend", more, ("train",))
    cards = [imagined(1, gib, teraflop) for gib, teraflop in ((24, 165), (32, 210), (80, 800))]
    needed = [[fitting(one, phase, "weekend", card) for phase in ("image", "video")] for card in cards]
    hours = [sum(each.gpu_hours(card.speed) for each in of) for card, of in zip(cards, needed)]
    assert hours[0] <= 48
    written = " | ".join(f"{n:.1f} h" if n < 10 else f"{n:.0f} h" for n in hours)
    gib = max(each.bytes for each in needed[0]) / GIB
    assert f"| {label} | {gib:.1f} | {written} |\n" in (DOCS / "train.md").read_text(encoding="utf-8")


def test_what_the_docs_say_of_each_saving():
    text = (DOCS / "presets.md").read_text(encoding="utf-8")
    settings = [f"discriminator_step={step}" for step in ("two_pass", "separate", "batched")]
    for setting in ("", *settings, "checkpointing=none", "image_height=512 image_width=512"):
        cells = [f"`{setting}`" if setting else "the recipe"]
        for name in ("wan2.1-1.3b-480p", "wan2.2-5b"):
            for phase in ("image", "video"):
                sections = (f"stage2.weekend.{phase}", "train", "data")
                one = load_preset(name, setting.split(), sections).with_recipe(
                    "weekend", setting.split(), sections
                )
                needed = account(one, phase, "weekend")
                cells.append(f"{needed.gpu_hours(165e12 / 2):.1f} h, {needed.bytes / GIB:.1f} GiB")
        assert f"| {' | '.join(cells)} |\n" in text
    for name, share, base, half in (("wan2.1-1.3b-480p", 0.002, 2.6, 1.3), ("wan2.2-5b", 0.006, 9.3, 4.7)):
        one = preset(name).with_recipe("weekend")
        forward = cost(one, tokens(one, "video"), True).forward
        assert counts_of(one.model).frozen_text(one.model) / forward == pytest.approx(share, rel=0.05)
        frozen = account(one, "video", "weekend").memory["frozen base"] / GIB
        assert (round(frozen, 1), round(frozen / 2, 1)) == (base, half)


def test_the_command_line_has_the_last_word_over_a_recipe():
    one = preset("wan2.1-1.3b-480p")
    changed = one.with_recipe("weekend", ["frames=17", "mode=full"], ("train", "data"))
    assert (changed.data.frames, changed.train.mode, changed.train.ema_decays) == (17, "full", ())


@pytest.mark.parametrize(
    "name, gigabytes", [("wan2.1-1.3b-720p", 35), ("wan2.2-5b", 124), ("wan2.1-14b", 354)]
)
def test_weights_and_states_are_24_bytes_a_parameter(name, gigabytes):
    one = preset(name, "ema_decays=[]", "context_parallel=1", "sync_every_microbatch=true")
    for gpus, share in ((1, 1), (8, 8)):
        memory = account(one, "video", "budget", gpus).memory
        states = sum(memory[kind] for kind in ("weights (fp32)", "optimizer", "averages", "gradients"))
        heads = 12 * account(one, "video", "budget").parameters["discriminator's heads"]
        assert states * share / 1e9 == pytest.approx(gigabytes + heads / 1e9, rel=0.05)


def test_gradients_that_are_reduced_once_an_update_are_whole():
    once, each = (
        account(preset("wan2.2-5b", f"sync_every_microbatch={flag}"), "video", None, 8).memory["gradients"]
        for flag in ("false", "true")
    )
    assert once == pytest.approx(8 * each)


@pytest.mark.parametrize(
    "name, two_pass, batched", [("wan2.1-1.3b-720p", 10.2, 31), ("wan2.2-5b", 5, 15), ("wan2.1-14b", 36, 106)]
)
def test_activations_of_the_discriminator(name, two_pass, batched):
    """Slim heads add nothing: their backward passes end before a block is run again, which needs more."""
    one = preset(name, "context_parallel=1", "head_width=128")
    several = preset(
        name, "context_parallel=1", "head_width=128", "stage2.paper.video.discriminator_step=batched"
    )
    n, model = tokens(one, "video"), one.model
    assert account(several, "video", "paper").memory["activations"] / GIB == pytest.approx(batched, abs=0.6)
    kept = 2 * n * model.width * model.layers
    generator_step = account(one, "video", "paper").memory["activations"]
    assert (generator_step - kept) / GIB == pytest.approx(two_pass, rel=0.06)


def test_the_targets_fit():
    for name, overrides, gpus, gib in (
        ("wan2.1-1.3b-480p", ["mode=lora"], 1, 24),
        ("wan2.2-5b", ["mode=lora"], 1, 32),
        ("wan2.1-1.3b-480p", [], 1, 80),
        ("wan2.1-14b", [], 8, 80),
    ):
        for stage in ("image", "video"):
            fitting(preset(name, *overrides), stage, "budget", imagined(gpus, gib, 400))


@pytest.mark.parametrize(
    "name, overrides, gpus, gib, sentence",
    [
        ("wan2.1-1.3b-480p", [], 1, 24, "on each GPU, which 24 GiB cannot hold: add train.mode=lora ("),
        (
            "wan2.1-14b",
            ["sync_every_microbatch=false"],
            8,
            80,
            "which 8 x 80 GiB cannot hold: add train.sync_every_microbatch=true (",
        ),
        (
            "wan2.1-1.3b-720p",
            ["stage2.budget.video.discriminator_step=batched"],
            1,
            64,
            "add stage2.budget.video.discriminator_step=two_pass (",
        ),
    ],
)
def test_what_does_not_fit_names_the_nearest_that_does(name, overrides, gpus, gib, sentence):
    with pytest.raises(AptError) as error:
        fitting(preset(name, *overrides), "video", "budget", imagined(gpus, gib, 400))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    change = str(error.value).split("add ")[1].split(" (")[0].split()
    fitting(preset(name, *overrides, *change), "video", "budget", imagined(gpus, gib, 400))


@pytest.mark.parametrize(
    "overrides, gpus, sentence",
    [
        (
            ["context_parallel=8"],
            8,
            "context_parallel=8 does not divide the 12 attention heads of wan2.1-1.3b-480p: use 6.",
        ),
        (
            ["context_parallel=4"],
            6,
            "context_parallel=4 does not divide 6 processes: use a multiple of 4, or context_parallel=2.",
        ),
        ([], 8, "batch=9062 does not divide over 8 groups of processes: use 9056 or 9064."),
    ],
)
def test_what_does_not_divide(overrides, gpus, sentence):
    with pytest.raises(AptError) as error:
        account(preset("wan2.1-1.3b-480p", *overrides), "image", "paper", gpus)
    assert str(error.value) == sentence


@pytest.mark.parametrize("name", REAL)
def test_what_is_written_beside_a_preset_is_its_account(name):
    text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    for line in summary(preset(name)):
        assert f"# {line}\n" in text
    assert (
        preset(name).phases("paper").image.batch == 9062 and preset(name).phases("paper").video.batch == 2048
    )
    for phase in (preset(name).phases("budget").image, preset(name).phases("budget").video):
        assert (phase.batch, phase.updates) == (256, 200)
