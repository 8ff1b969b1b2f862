"""A run's console output and log, written once, by the main process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_core.models.attention import NATIVE
from trainer.data.precompute import SKIPPED, Report
from trainer.jobs.plan import Plan
from trainer.machines.distributed import World
from trainer.run.folders import newest_state
from trainer.run.monitor import Monitor
from trainer.run.progress import say, stage_bar
from trainer.run.state import best_state


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
