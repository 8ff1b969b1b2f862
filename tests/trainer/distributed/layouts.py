"""A base of four blocks, shards of random latents, and workers (one process or several) to train on them."""

import os
import socket
import sys
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace

import tiny_models
import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import apt_core.loading.checkpoint
import apt_core.loading.mmdit_files
import trainer.stages.networks
from apt_core.files.tensorfile import write_tensors
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.mmdit_files import load_mmdit, save_mmdit
from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.wan import WanBackbone
from trainer.config import Adversarial, Distill, Sampling, Train
from trainer.data.batches import Batches
from trainer.data.shards import Sample, ShardWriter
from trainer.machines.distributed import World, connect
from trainer.machines.parallel import Parallel
from trainer.run.judge import LatentJudge
from trainer.run.state import Keep
from trainer.stages.adversarial import adversarial
from trainer.stages.distill import distill
from trainer.stages.dmd import match_distributions
from trainer.stages.setup import Setup

SHAPE, TEXT_LENGTH, TEXT_DIM = (4, 2, 4, 6), 5, 10
SAMPLES = 11
TIMEOUT = 3600  # seconds, of all runs of one start, where other work has most of the cores
WATCHED = []
FP32 = torch.float32
# Workers are forked from a server that has imported everything once, and has never run a backward pass.
WORKERS = get_context("forkserver")
WORKERS.set_forkserver_preload(
    ["trainer.stages.adversarial", "trainer.stages.distill", "torch.distributed.checkpoint"]
)
SETTINGS = {
    "updates": 5,
    "batch": 4,
    "lr_generator": 5e-6,
    "lr_discriminator": 5e-6,
    "ema_decay": 0.9,
    "shift": 2.0,
    "r1_weight": 100.0,
    "r1_sigma": 0.1,
    "discriminator_step": "batched",
}
DMD = {"method": "dmd", "fake_updates": 2, "lr_fake": 1e-5, "updates": 5}
STABLE = {
    "relativistic": True,
    "r2_weight": 50.0,
    "r2_sigma": 0.1,
    "reg_fraction": 0.5,
    "centering": 0.01,
    "warmup": 1,
    "updates": 4,
}


class Text:
    """A text encoder of which only the negative prompt is asked."""

    text_length = TEXT_LENGTH

    def encode(self, prompts):
        return [torch.full((2, TEXT_DIM), 0.1 * len(prompt)) for prompt in prompts]

    def pad(self, embeddings, length):
        out = torch.zeros(len(embeddings), length, TEXT_DIM)
        for row, embedding in zip(out, embeddings):
            row[: len(embedding)] = embedding
        return out


@dataclass(frozen=True)
class Files:
    """What a run starts from."""

    base: Path
    start: Path
    shards: Path


def tiny_wan(seed: int) -> WanBackbone:
    return tiny_models.tiny_wan(layers=4, seed=seed, text_dim=TEXT_DIM, ffn_dim=48)


def tiny_mmdit(seed: int) -> MMDiTBackbone:
    return tiny_models.tiny_mmdit(layers=4, seed=seed, text_dim=TEXT_DIM)


def write_shards(folder: Path, shapes=(SHAPE,), samples: int = SAMPLES, broken: int | None = None) -> None:
    generator = torch.Generator().manual_seed(3)
    facts = {
        "vae": {"stride": [4, 8, 8], "channels": 4},
        "text": {"dim": TEXT_DIM, "length": TEXT_LENGTH},
        "fps": 8,
    }
    keys = []
    with ShardWriter(folder, {}) as writer:
        for number in range(samples):
            for kind in ("image", "video"):
                sample = Sample(f"{kind}-{number}.mp4", kind, "a caption", "1-1")
                latent = torch.randn(shapes[number % len(shapes)], generator=generator)
                if number == broken:
                    latent[0, 0, 0, 0] = 3e38  # finite, as shards must be, but not after one product
                writer.add(
                    sample, latent, torch.randn(1 + number % TEXT_LENGTH, TEXT_DIM, generator=generator)
                )
                keys.append(sample.key)
        writer.finish(keys, facts)


def write_files(folder: Path) -> Files:
    out = Files(folder / "base.safetensors", folder / "start.safetensors", folder / "shards")
    for path, seed in ((out.base, 0), (out.start, 1)):
        model = tiny_wan(seed)
        save_generator(path, model, model.config, {"kind": "base"})
        other = tiny_mmdit(seed)
        save_mmdit(mmdit(path), other, other.config, {"kind": "base"})
    write_shards(out.shards)
    return out


def mmdit(path: Path) -> Path:
    """The MMDiT beside a Wan."""
    return path.with_stem(f"{path.stem}-mmdit")


@dataclass(frozen=True)
class Layout:
    """How a run is laid out: processes, and what they are told."""

    processes: int = 1
    parallel: Parallel = Parallel()
    settings: dict = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_workers(processes: int, function, *args) -> list:
    """Processes that each call `function(*args)`, torchrun's variables set."""
    port = free_port()
    workers = [
        WORKERS.Process(target=_worker, args=(rank, processes, port, function, args))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    return workers


def run_workers(processes: int, function, *args) -> None:
    """Start them and wait. Fails when one of them does."""
    for worker in start_workers(processes, function, *args):
        worker.join(TIMEOUT)
        assert worker.exitcode == 0, f"a process ended with {worker.exitcode}"


def _worker(rank: int, processes: int, port: int, function, args) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    function(*args)


def setup(layout: Layout, out: Path, batches: Batches, world: World, options: dict) -> Setup:
    """A stage's setup with a layout; takes its own fields out of the options."""
    given = {field.name: options.pop(field.name) for field in fields(Setup) if field.name in options}
    return Setup(
        batches=batches,
        out=out / "generator.safetensors",
        seed=0,
        metadata={},
        report=lambda *args: None,
        world=world,
        parallel=layout.parallel,
        **given,
    )


def train_adversarial(files: Files, layout: Layout, out: Path, options: dict | None = None) -> None:
    """One phase with a layout. Its last state is kept in `out`/states, its history in `out`/rows.pt."""
    settings = Adversarial(**{**SETTINGS, **layout.settings})
    total = settings.warmup + settings.updates
    with connect(
        "cpu", context_parallel=layout.parallel.context_parallel, sharded=layout.parallel.sharded
    ) as world:
        batches = Batches(files.shards, Text(), seed=0)
        options = {
            "keep": Keep(out / "states", every=total, judge=LatentJudge(batches, "video", 3, 0, world)),
            **(options or {}),
        }
        start, base = options.pop("start", files.start), options.pop("base", files.base)
        given = setup(layout, out, batches, world, options)
        rows = adversarial(
            "video",
            start,
            base,
            settings,
            given,
            **options,
        )
        base_after = watched_base() if given.load is load_and_watch else {}
        if world.main:
            torch.save(rows, out / "rows.pt")
            torch.save(base_after, out / "base.pt")


DISTILL = {
    "updates": 5,
    "batch_image": 2,
    "batch_video": 4,
    "video_share": 0.5,
    "lr": 5e-6,
    "steps": 4,
    "guidance": 3.0,
    "fraction_at_final": 0.5,
    "target_decay": 0.9,
    "ema_decay": 0.9,
}
"""Stage 1 of the layouts, where they do not say otherwise."""


def train_distill(files: Files, layout: Layout, out: Path, options: dict | None = None) -> None:
    """Stage 1 with a layout and the method of its settings; as train_adversarial."""
    settings = DISTILL | layout.settings
    sampling = Sampling(
        guidance=3.0, shift_image=1.0, shift_video=3.0, negative_prompt="bad", second_time=0.7
    )
    train = Train(lora_rank=4, lora_alpha=8.0)  # of a fake score under a whole generator
    preset = SimpleNamespace(distill=Distill(**settings), sampling=sampling, train=train)
    with connect(
        "cpu", context_parallel=layout.parallel.context_parallel, sharded=layout.parallel.sharded
    ) as world:
        batches = Batches(files.shards, Text(), seed=0)
        judge = LatentJudge(batches, "video", 3, 0, world)
        options = {"keep": Keep(out / "states", every=settings["updates"], judge=judge), **(options or {})}
        base, given = options.pop("base", files.base), setup(layout, out, batches, world, options)
        assert not options, f"stage 1 knows no {', '.join(options)}"
        rows = (match_distributions if preset.distill.method == "dmd" else distill)(base, preset, given)
        base_after = watched_base() if given.load is load_and_watch else {}
        if world.main:
            torch.save(rows, out / "rows.pt")
            torch.save(base_after, out / "base.pt")


def run_layouts(files: Files, processes: int, jobs: list[tuple], double: bool = True) -> None:
    """Several runs, by default in fp64, (layout, out, train, options) each, one after the other on the same
    processes: starting them is what takes time.
    """
    ports = [free_port() for _ in jobs]
    for _, out, *_ in jobs:
        out.mkdir(parents=True, exist_ok=True)
    run_workers(processes, *([in_double] if double else []), train_all, files, jobs, ports)


class Doubled(ModuleType):
    """torch as this project's modules see it: whoever asks for fp32 gets fp64. Others, safetensors among
    them, must know the two apart.
    """

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_double(function, *args) -> None:
    """Call it with fp64 in fp32's place, for the rest of this process. What it writes for others it writes in
    fp32, as ever.

    These optimizers move a weight by its gradient's sign more than by its size. Of a gradient near zero
    rounding decides the sign, and the microbatches, the processes and the machine's kernels decide the
    rounding: in fp32 two layouts part by a whole step sooner or later. In fp64 what is left of a difference
    is a mistake.
    """
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    FunctionalTensor.float = FunctionalTensor.double  # what a compiler traces with
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("apt_core", "trainer") and hasattr(module, "torch"):
            module.torch = Doubled("torch")
    for load in (load_transformer, load_backbone, load_mmdit):  # their defaults were bound before
        load.__defaults__ = tuple(torch.float64 if value is FP32 else value for value in load.__defaults__)
    for module in (apt_core.loading.checkpoint, apt_core.loading.mmdit_files, trainer.stages.networks):
        module.write_tensors = write_in_fp32
    function(*args)


def write_in_fp32(path: Path, tensors: dict, metadata: dict) -> None:
    write_tensors(path, {name: value.to(FP32) for name, value in tensors.items()}, metadata)


def train_all(files: Files, jobs: list[tuple], ports: list[int]) -> None:
    for (layout, out, train, options), port in zip(jobs, ports):
        os.environ["MASTER_PORT"] = str(port)
        train(files, layout, out, options)


def load_and_watch(path: Path, **options):
    """load_backbone; the last one loaded that gets adapters is the one that is watched."""
    WATCHED.append(load_backbone(path, **options))
    return WATCHED[-1]


def watched_base() -> dict[str, torch.Tensor]:
    """The weights below the adapters. All processes must call."""
    base = [model for model in WATCHED if any(".adapters." in name for name in model.state_dict())][-1]
    weights = {name: p.detach() for name, p in base.named_parameters() if ".adapters." not in name}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}


def run_layout(
    files: Files,
    layout: Layout,
    out: Path,
    train=train_adversarial,
    options: dict | None = None,
    double: bool = False,
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    run_workers(layout.processes, *([in_double] if double else []), train, files, layout, out, options)
    return out


def state_of(out: Path, update: int) -> dict[str, torch.Tensor]:
    """Every tensor of a kept state, by its full name: weights, optimizer states and averages, whole."""
    path = out / f"state-{update}.pt"
    dcp_to_torch_save(out / "states" / f"step-{update:06d}", path)
    return {
        f"{part}/{name}": value
        for part, tensors in torch.load(path).items()
        for name, value in tensors.items()
    }


def assert_close(one: Path, other: Path, update: int, tolerance: float) -> None:
    """Equal losses and equal states, within the tolerance of a tensor's largest number (0: bit for bit)."""
    rows, expected = torch.load(one / "rows.pt"), torch.load(other / "rows.pt")
    assert len(rows) == len(expected) == update
    for row, wanted in zip(rows, expected):
        assert row.keys() == wanted.keys()
        for name in row:
            assert abs(row[name] - wanted[name]) <= tolerance * max(1, abs(wanted[name])), (
                name,
                row[name],
                wanted[name],
            )
    state, wanted = state_of(one, update), state_of(other, update)
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        # Squares of gradients that are zero but for rounding, 1e-16 of fp64, have no digits to agree in.
        allowed = tolerance and max(tolerance * float(wanted[name].abs().max()), 1e-24)
        assert (value - wanted[name]).abs().max() <= allowed, (
            name,
            float((value - wanted[name]).abs().max()),
        )
