"""What a plan and its run print and log, once, by the main process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from apt_core.models.attention import NATIVE
from trainer.data.precompute import SKIPPED, Report
from trainer.jobs.plan import Plan
from trainer.machines.distributed import World
from trainer.machines.machine import GIB
from trainer.run.folders import newest_state
from trainer.run.monitor import Monitor
from trainer.run.progress import console, say, stage_bar
from trainer.run.state import best_state


def show_plan(plan: Plan) -> None:
    """Print a plan. If the stage does not fit, raises the AptError of `Plan.check_fit` after printing."""
    preset, stage, machine, needed = plan.preset, plan.stage, plan.machine, plan.account
    if plan.start and plan.start.note:
        say(plan.start.note)
    kind_of = preset.distill.method if stage == "distill" else plan.recipe
    table = Table(
        title=f"{preset.name}, {stage} ({kind_of}), {preset.train.mode}", title_justify="left", box=None
    )
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    table.add_row("machine", f"{machine.gpus} x {machine.name}")
    table.add_row(
        "each of them", f"{machine.memory / GIB:.1f} GiB, {machine.peak / 1e12:.3g} TFLOP/s at best"
    )
    if plan.attention:
        table.add_row("attention", plan.attention)
    for kind, (tokens, batch) in needed.samples.items():
        table.add_row(f"tokens of one {kind}", f"{tokens:,}")
        table.add_row(f"batch of {kind}s", f"{batch:,}")
    if stage != "distill":
        for name, gamma in plan.settings.objective().gammas().items():
            penalty, _, time = name.partition("_gamma")
            table.add_row(f"lambda sigma^2 of a{penalty.upper()}{time.replace('_', ', ')}", f"{gamma:.3g}")
    for name, count in needed.parameters.items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    for kind, size in needed.memory.items():
        table.add_row(f"GiB per GPU, {kind}", f"{size / GIB:.2f}")
    table.add_row("GiB per GPU, in all", f"{needed.bytes / GIB:.2f}")
    table.add_row("FLOPs per update", f"{needed.flops:.3g}")
    table.add_row("updates", f"{needed.updates:,}")
    if needed.warmup:
        table.add_row("warm-up updates, discriminator alone", f"{plan.settings.warmup:,}")
    per_hour = 3600 * machine.gpus * machine.speed / needed.flops
    table.add_row("updates per hour, at half of the peak", f"{per_hour:.3g}")
    hours = needed.gpu_hours(machine.speed)
    table.add_row("hours in all", f"{hours / machine.gpus:.3g} ({hours:.3g} GPU-hours)")
    console.print(table)
    plan.check_fit()
    say(
        f"It fits: {needed.bytes / GIB:.1f} of {machine.usable / GIB:.1f} GiB that a run can use on each GPU."
    )


@contextmanager
def progress(title: str, world: World) -> Iterator[Callable]:
    """A progress bar; other processes than the main one show none."""
    if not world.main:
        yield lambda *_: None
        return
    with stage_bar(title) as report:
        yield report


@contextmanager
def monitor(plan: Plan, world: World, bar: Callable) -> Iterator[Callable]:
    """A stage's log; what is reported to it also moves `bar`."""
    if not world.main:
        yield bar
        return
    relativistic = plan.stage != "distill" and plan.settings.relativistic
    options = {"device": world.device, "relativistic": relativistic, "wandb": plan.preset.train.wandb}
    with Monitor(
        plan.log, plan.work, settings=plan.preset.model_dump(mode="json"), forward=bar, **options
    ) as log:
        yield log


def attention_line(plan: Plan) -> str:
    """Which attention kernel the stage's passes use."""
    if plan.stage != "distill":
        heads = f"{NATIVE} in the discriminator's heads, which compute in fp32"
        return f"attention: {plan.attention} in all passes of generator and discriminator; {heads}"
    dmd = plan.preset.distill.method == "dmd"
    return (
        f"attention: {plan.attention} in all passes of "
        f"{'generator and both scores' if dmd else 'student and teacher'}"
    )


def tell_result(plan: Plan) -> None:
    """Print which file is the result, and whether an earlier state was judged better."""
    newest, best = newest_state(plan.states), best_state(plan.states)
    if best is None:
        say(f"{plan.result} is the result.")
    elif best[0] == newest:
        say(f"{plan.result} is the result, and the best that was judged ({best[1]:.3g}).")
    else:
        say(
            f"{plan.result} is the result; an earlier state was judged better ({best[1]:.3g}): "
            f"to have that one, export {best[0]}."
        )


def tell_precomputed(made: Report, folder: Path) -> None:
    """Print how many samples `folder` holds now, and what was left out."""
    for bad in made.skipped:
        say(f"left out: {bad.reason}")
    for name, done in made.converted.items():
        say(f"{name}: {', '.join(done)}.")
    if made.skipped:
        say(f"{len(made.skipped)} left out, listed in {folder / SKIPPED}")
    if made.dropped:
        say(
            f"{made.dropped} samples of the earlier index are not in this data, "
            "so they are no longer trained on: "
            "give another --out to keep both."
        )
    counts = ", ".join(f"{count} {kind}s" for kind, count in made.samples.items())
    say(f"{counts} in {folder}; {made.encoded} encoded now, {made.clips_per_second:.2f} a second.")
