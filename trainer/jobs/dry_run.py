"""`--dry-run`: print a plan, and what its stage needs on the machine."""

from rich.table import Table

from trainer.jobs.plan import Plan
from trainer.machines.account import batch_of
from trainer.machines.flops import tokens
from trainer.machines.machine import GIB
from trainer.run.progress import console, say


def show_plan(plan: Plan) -> None:
    """Print a plan. If the stage does not fit, raises the AptError of `Plan.check_fit` after printing."""
    preset, stage, machine, needed = plan.preset, plan.stage, plan.machine, plan.account
    if plan.start and plan.start.note:
        say(plan.start.note)
    kinds = ("image", "video") if stage == "distill" else (stage,)
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
    for kind in kinds:
        table.add_row(f"tokens of one {kind}", f"{tokens(preset, kind):,}")
        table.add_row(f"batch of {kind}s", f"{batch_of(preset, stage, kind, plan.recipe):,}")
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
