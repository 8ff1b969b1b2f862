"""Training states on disk (torch.distributed.checkpoint). They are saved in the background, whole or not at
all, and can be resumed on any number of processes.
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from apt_core.errors import AptError
from apt_core.files.jsonfile import read_object, write_json
from trainer.data.sampling import ORDER
from trainer.machines.distributed import World
from trainer.run.folders import (
    FACTS,
    UNFINISHED,
    newest_state,
    state_name,
    unfinished_states,
    whole_states,
)
from trainer.run.identity import refuse_another
from trainer.run.lock import Lock
from trainer.run.state_files import StateReader, StateWriter, check_digests, gather_digests, read_facts
from trainer.run.vote import Vote

# Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# a later stage would go on from its own states, and not begin with what the new ones lead to
ANEW = "delete that folder, and those of later stages, to begin anew"


@dataclass(frozen=True)
class Keep:
    """Where training states are saved and which of them are kept.

    every: updates between two states.
    last: how many of the newest are kept.
    best: how many of those with the best score are kept in addition.
    judge: called by all processes with the averaged network when a state is due; returns metrics for the
        history's row. One of them is the score, `judged`; lower is better.
    describe: writes the files beside the states; the main process calls it once it holds the folder's lock.
    """

    folder: Path
    every: int = 50
    last: int = 2
    best: int = 1
    judge: Callable[[nn.Module], Mapping[str, float]] | None = None
    describe: Callable[[], None] | None = None


class Preempted(SystemExit):
    """The process was told to stop and has saved its state; the same command continues from there. Ends the
    process with code 0.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Part(Protocol):
    """A part of a training state. tensors() returns the live tensors by name, and loading writes into them;
    loaded(steps) is called after that.
    """

    steps: int

    def tensors(self) -> dict[str, Tensor]: ...

    def loaded(self, steps: int) -> None: ...


class Checkpoints:
    """A folder of training states. Each is a DCP checkpoint with a run.json. `step-000100` is the state after
    100 updates, `step-000100-half` the one after the discriminator's step of the next update; with several
    steps of a fake score in an update there are -half, -half2 and so on.

    A state is written under another name and renamed when it is complete, so every folder named step-... can
    be loaded. All processes must call the methods together.
    """

    def __init__(self, keep: Keep, world: World, identity: Mapping, idle: Collection[str] = ()):
        self.keep, self.world, self.idle = keep, world, idle
        self.identity = json.loads(json.dumps(identity))
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writing: tuple[Path, dict, object] | None = None
        self._lock = Lock(keep.folder)
        self._lock.take_together(world)
        if world.main:
            for rest in unfinished_states(keep.folder):
                shutil.rmtree(rest)
        world.barrier()

    def release(self) -> None:
        """Release the folder's lock."""
        self._lock.release()

    def newest(self) -> Path | None:
        """The state that a resumed run continues from."""
        return newest_state(self.keep.folder)

    def facts(self, path: Path) -> dict:
        """The contents of a state's run.json. Raises AptError if it is damaged, or belongs to a run with
        other settings (another identity).
        """
        remedy = f"delete the folder {path.name}, and the run goes on from the state before it"
        facts = read_facts(path, remedy)
        old = {name: value for name, value in facts["identity"].items() if name not in self.idle}
        shared = {name: value for name, value in self.identity.items() if name in old}
        refuse_another(self.keep.folder, "run", old, shared, ANEW)
        if new := sorted(self.identity.keys() ^ old.keys()):
            raise AptError(
                f"{self.keep.folder} holds a run of another version of this program, which "
                f"{'had no' if new[0] in self.identity else 'had a'} {new[0]!r}: give another --out, or "
                f"continue with that version, or {ANEW}."
            )
        return facts

    def load(self, path: Path, tensors: dict[str, dict[str, Tensor]], facts: Mapping) -> None:
        """Load a state into `tensors`. The number of processes that saved it does not matter. Raises AptError
        if it does not fit or is damaged.
        """
        digests = facts.get("files", {})
        reader, problem = StateReader(path, digests), None
        try:
            check_digests(path, digests, sorted(digests)[self.world.rank :: self.world.size])
            reader.read_metadata()
        except AptError as error:
            problem = str(error)
        if found := [problem for problem in self.world.gather(problem) if problem]:
            raise AptError(found[0])
        try:
            dcp.load(
                tensors,
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (CheckpointException, RuntimeError, OSError, ValueError, KeyError) as error:
            raise AptError(
                f"{path} cannot be loaded ({_reason(error)}): delete it, "
                "and the run goes on from the state before it."
            ) from error

    def save(self, name: str, tensors: dict[str, dict[str, Tensor]], facts: Mapping) -> None:
        """Copy the tensors now, and write them while training continues. Raises AptError if the previous
        state could not be written.
        """
        self.wait()
        part = self.keep.folder / f"{name}{UNFINISHED}"
        if self.world.main:
            shutil.rmtree(part, ignore_errors=True)
        self.world.barrier()
        facts = {"identity": self.identity, **facts}
        future = dcp.async_save(
            tensors, storage_writer=StateWriter(part), process_group=self._group, no_dist=self._group is None
        )
        self._writing = part, facts, future

    def poll(self) -> None:
        """If the state in writing is complete, rename it."""
        if self._writing and self.world.main and self._writing[2].done() and not self._writing[2].exception():
            self._publish()

    def wait(self) -> None:
        """Wait until the state in writing is complete. Raises AptError in all processes if it cannot be
        written.
        """
        if not self._writing:
            return
        part, _, future = self._writing
        problem = future.exception()
        if problem is None and self.world.main:
            try:
                self._publish()
            except (OSError, AptError) as error:
                problem = error
        self._writing = None
        if reasons := [reason for reason in self.world.gather(problem and _reason(problem)) if reason]:
            if self.world.main:  # nothing is being written there any more, and a full disk needs the space
                shutil.rmtree(part, ignore_errors=True)
            last = self.newest()
            stands = f"{last.name} is still there" if last else "there is no earlier one"
            raise AptError(
                f"{part.stem} could not be written to {self.keep.folder} ({reasons[0]}): "
                f"make space there; {stands}."
            ) from problem

    def _publish(self) -> None:
        part, facts, _ = self._writing
        if not part.exists():  # published before
            return
        write_json(part / FACTS, facts | {"files": gather_digests(part)})
        os.replace(part, part.with_suffix(""))
        self._prune()

    def _prune(self) -> None:
        states = self._complete()
        scores = {path: score_of(path) for path in states}
        judged = sorted((path for path in states if scores[path] is not None), key=scores.__getitem__)
        stay = {*states[-self.keep.last :], *judged[: self.keep.best]}
        for path in states:
            if path not in stay:
                (path / FACTS).unlink()  # from here on it counts as incomplete
                shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        return whole_states(self.keep.folder)


def score_of(path: Path) -> float | None:
    """The score of a state; None if it has none, or its run.json cannot be read."""
    try:
        found = read_object(path / FACTS, "").get("score")
    except AptError:
        return None
    return found if isinstance(found, float | int) and math.isfinite(found) else None


def best_state(folder: Path) -> tuple[Path, float] | None:
    """The state with the best score, and that score; None if no state has one."""
    scores = {path: score_of(path) for path in whole_states(folder)}
    return min(
        ((path, score) for path, score in scores.items() if score is not None),
        key=lambda pair: pair[1],
        default=None,
    )


def _reason(error: BaseException) -> str:
    """An error in one line. For a failed collective, the error of the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]


class _Stop(Exception):
    pass


def _kept(folder: Path) -> str:
    """For the sentence about a lost process: what has been saved."""
    if newest := newest_state(folder):
        return f"{newest.name} in {folder} is saved, and the same command goes on from there"
    return f"{folder} holds no state yet, and the same command begins this stage again"


class Run:
    """The progress of one training: the rows of metrics, the number of the next update, the states on disk,
    and the stop when a signal arrives. Use it in a `with` statement around the training loop.

    keep: None stores nothing and leaves signals alone.
    identity: settings that must be the same when a run is resumed.
    parts: the parts of a state, by name; keep.judge gets the network with the weights of the part `averages`.
    pace: how many steps a part takes per update, 1 unless given.
    idle: settings that earlier versions put into a state's identity, and that change nothing in this run.
    resume: False refuses a folder that has a state.

    Raises AptError for a folder with another run.
    """

    def __init__(
        self,
        keep: Keep | None,
        world: World,
        identity: Mapping,
        parts: Mapping[str, Part],
        resume: bool = True,
        pace: Mapping[str, int] | None = None,
        idle: Collection[str] = (),
    ):
        self.keep, self.world, self.parts, self.pace = keep, world, parts, pace or {}
        self.update, self.rows = 0, []
        self._signalled, self._handlers, self._saved = False, {}, "step-000000"
        self._vote = Vote(world)
        self._checkpoints = Checkpoints(keep, world, {**identity, "order": ORDER}, idle) if keep else None
        if keep and (newest := self._checkpoints.newest()):
            try:
                if not resume:
                    raise AptError(
                        f"{keep.folder} holds the states of a run ({newest.name} is the newest): "
                        f"resume it, or give another --out, or {ANEW}."
                    )
                self._restore(newest)
            except BaseException:
                self._checkpoints.release()
                raise

        if keep and keep.describe and world.main:
            keep.describe()
        if keep and world.pulse:
            world.pulse.kept = partial(_kept, keep.folder)

    def __enter__(self) -> "Run":
        if self.keep:
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            if self.keep and kind in (None, _Stop):
                self._save(judged=kind is None)
                self._checkpoints.wait()
                self.world.barrier()
            elif self.keep:  # some processes may be gone: do nothing that needs all of them
                self._checkpoints.poll()
        finally:
            if self.keep:
                self._checkpoints.release()
        if kind is _Stop:
            where = f"in update {self.update + 1}; all is saved in {self.keep.folder}"
            raise Preempted(
                f"stopped by a signal {where}, and the same command goes on from there."
            ) from None

    def stop(self) -> None:
        """Leave the training loop if any process was told to stop; all processes leave at the same call. They
        ask each other every few seconds.
        """
        if self.keep and self._vote(self._signalled):
            raise _Stop

    def finish_update(self) -> None:
        """Call after each update. Saves a state if one is due."""
        self.update += 1
        self._vote.start()
        if self.keep:
            self._checkpoints.poll()
            if self.update % self.keep.every == 0:
                self._save(judged=True)

    def _save(self, judged: bool) -> None:
        steps = {name: part.steps for name, part in self.parts.items()}
        ahead = (max(0, count - self.update * self.pace.get(part, 1)) for part, count in steps.items())
        name = state_name(self.update, sum(ahead))
        if name == self._saved:
            return
        self._saved, score = name, None
        if judged and self.keep.judge:
            with self.parts["averages"].applied() as network:
                self.rows[-1] |= self.keep.judge(network)
            score = self.rows[-1]["judged"]
        facts = {
            "update": self.update,
            "score": score,
            "steps": steps,
            "rows": [dict(row) for row in self.rows],
        }
        self._checkpoints.save(name, {name: part.tensors() for name, part in self.parts.items()}, facts)

    def _restore(self, path: Path) -> None:
        facts = self._checkpoints.facts(path)
        if absent := sorted(self.parts.keys() - facts["steps"].keys()):
            raise AptError(f"{path / FACTS} has no steps of {absent[0]}: delete the folder {path.name}.")
        self._checkpoints.load(path, {name: part.tensors() for name, part in self.parts.items()}, facts)
        for name, part in self.parts.items():
            part.loaded(facts["steps"][name])
        self.update, self.rows = facts["update"], facts["rows"]
        self._saved = path.name

    def _on_signal(self, *_) -> None:
        self._signalled = True
