"""Stage 1 (3.2): consistency distillation of the guided base into one step. Its EMA starts the generator of stage 2."""

from collections.abc import Callable
from pathlib import Path

import torch

from apt_core.checkpoint import load_transformer, save_generator
from apt_core.consistency import consistency_backward
from apt_core.ema import Ema
from apt_core.flow import sample_noise, sample_uniform
from trainer.batches import Batches
from trainer.config import Preset
from trainer.log import History
from trainer.mini.muon import Muon

Report = Callable[[int, int, dict[str, float]], None]


def distill(base: Path, batches: Batches, preset: Preset, out: Path, *, seed: int, metadata: dict, device: str = "cpu", report: Report) -> list[dict]:
    """Distil `base` (a checkpoint file) on `batches` and write the student's EMA to `out`.

    Each update sees images or clips, drawn with the preset's share. Returns the history of losses, one row an update.
    Raises AptError when a checkpoint is damaged or a loss is not finite.
    """
    settings = preset.distill
    teacher, student, target = (load_transformer(base, device=device) for _ in range(3))
    teacher.requires_grad_(False)
    target.requires_grad_(False)
    negative = batches.embed([preset.sampling.negative_prompt]).to(device)
    if settings.optimizer == "muon":
        optimizer = Muon(student.parameters())
    else:
        optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.95))
    target_ema = Ema(student, settings.target_decay, warmup=1)
    ema = Ema(student, settings.ema_decay, warmup=10)

    history = History()
    for update in range(settings.updates):
        kind = "video" if float(sample_uniform([update], seed, "distill/kind")) < settings.video_share else "image"
        kind = batches.available(kind)
        size = settings.batch_video if kind == "video" else settings.batch_image
        numbers, x, text = batches.take(kind, "distill", update, size)
        z = sample_noise(numbers, x.shape[1:], seed, "distill/z").to(device)
        u = sample_uniform(numbers, seed, "distill/u").to(device)
        consistency = settings.consistency(preset.sampling.shift(kind))
        metrics = consistency_backward(
            student, teacher, consistency, x.to(device), z, text.to(device), negative, u, target=target if settings.target_decay else None
        )
        history.add({f"{name}_{kind}": value for name, value in metrics.items()})
        optimizer.param_groups[0]["lr"] = settings.rate(update)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if settings.target_decay:
            target_ema.update(student)
            target_ema.copy_to(target)
        ema.update(student)
        report(update + 1, settings.updates, history.last())

    ema.copy_to(student)
    facts = {"kind": "generator", "phase": "distilled", "updates": settings.updates, "ema": settings.ema_decay}
    save_generator(out, student, student.config, metadata | facts, torch.float32)
    return history.rows()
