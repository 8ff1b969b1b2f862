"""Train the miniature's base: a small Wan transformer, by flow matching on drawn images and clips.

It takes two networks. The first has no weight decay, which reaches a small loss fastest. But its kernels
become twenty times as large as usual (root mean square 1), and later stages would need learning rates a
thousand times smaller than elsewhere. The second network has weight decay, which keeps it at normal scale. It
learns the first one's velocities, a target without noise, in a fifth of the updates, and becomes the base.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.files.atomic import replacing
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from apt_core.method.flow import interpolate, shift, velocity
from apt_core.method.generator import euler_cfg
from apt_core.models.vae import decode, encode, load_vae
from apt_core.models.wan import WanBackbone, predict_velocity
from trainer.stages.muon import Muon

from .clips import COLOR_NAMES, DIRECTION_NAMES, NEGATIVE_PROMPT, SHAPES, Scene, draw
from .judge import read_clip

TRANSFORMER = dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=6, freq_dim=256)
SHIFT = {"image": 1.5, "video": 3.0}
GUIDANCE = 2.0


@dataclass(frozen=True)
class Stage:
    """A part of the training. video: share of updates on clips; the rate goes linearly from lr to lr_end."""

    updates: int
    video: float
    lr: float
    lr_end: float


GROWN = (
    Stage(2000, 0.0, 0.04, 0.04),
    Stage(11500, 0.67, 0.04, 0.02),
    Stage(4500, 0.67, 0.02, 0.001),
    Stage(400, 0.8, 0.001, 0.025),
    Stage(4600, 0.8, 0.025, 0.018),
    Stage(3500, 0.8, 0.018, 0.0005),
)


BASE = (
    Stage(1800, 0.0, 0.02, 0.02),
    Stage(1200, 0.0, 0.02, 0.0004),
    Stage(10900, 0.6, 0.02, 0.02),
    Stage(10900, 0.6, 0.02, 0.0001),
    Stage(6400, 0.85, 0.01, 0.01),  # clips lagged behind images
    Stage(9600, 0.85, 0.01, 0.00005),
)
WEIGHT_DECAY = 0.1
EMA_WARMUP = 10


class Captions:
    """All possible captions, each embedded once. `table`: `[n, L, d]`; `rows`: a caption's row in it."""

    def __init__(self, text_encoder) -> None:
        texts = [NEGATIVE_PROMPT, ""]
        for color in COLOR_NAMES:
            for background in COLOR_NAMES:
                for shape in SHAPES:
                    for direction in (None, *DIRECTION_NAMES):
                        texts.append(
                            Scene(color, shape, background, direction, 0, (0, 0), 0, 0, 0, 0, 0).caption
                        )
        self.rows = {text: i for i, text in enumerate(texts)}
        self.table = text_encoder.pad(text_encoder.encode(texts), text_encoder.text_length)


def latent_pool(
    vae, captions: Captions, seed: int, count: int, moving: bool, device: str, report
) -> tuple[Tensor, Tensor]:
    """Encode `count` drawn samples: normalised latents `[n, 16, f, 6, 6]`, and their captions' rows `[n]`."""
    latents, rows = [], []
    started = time.time()
    for first in range(0, count, 64):
        pixels, scenes = draw(seed, range(first, min(count, first + 64)), moving)
        x = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float().to(device) / 127.5 - 1.0
        with torch.no_grad():
            latents.append(encode(vae, x).cpu())
        rows += [captions.rows[s.caption] for s in scenes]
    report(f"{count} {'clips' if moving else 'images'} encoded in {time.time() - started:.0f} s")
    return torch.cat(latents), torch.tensor(rows)


def train_base(
    out: Path,
    vae_file: Path,
    text_file: Path,
    *,
    work: Path,
    stages: tuple[Stage, ...] = BASE,
    teacher: Path | None = None,
    weight_decay: float = WEIGHT_DECAY,
    image_batch: int = 64,
    video_batch: int = 48,
    images: int = 8000,
    videos: int = 12000,
    text_dropout: float = 0.1,
    ema_decay: float = 0.998,
    seed: int = 0,
    amp: bool = False,
    compiled: bool = False,
    judge_every: int = 2000,
    judge_count: int = 64,
    device: str = "cpu",
    report=print,
) -> WanBackbone:
    """Train a transformer and write its EMA to `out`.

    work: folder for the latents and the training state; a run that was stopped continues from it.
    teacher: a transformer whose velocities to learn, instead of those of data and noise.
    Each time that the model is judged, the log gets the smallest and largest kernel (root mean square).
    """
    from apt_core.loading.checkpoint import save_generator

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae, text = load_vae(vae_file).to(device), load_text_encoder(text_file)
    captions = Captions(text)
    pools = {}
    for kind, count in (("image", images), ("video", videos)):
        cached = work / f"{kind}-{count}.pt"
        if not cached.exists():
            with replacing(cached) as part:
                torch.save(
                    latent_pool(vae, captions, seed + 3000, count, kind == "video", device, report), part
                )
        pools[kind] = tuple(part.to(device) for part in torch.load(cached))
    table = captions.table.to(device)

    config = dict(TRANSFORMER, in_channels=16, out_channels=16, text_dim=table.shape[-1])
    model = WanBackbone(**config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = Muon(model.parameters(), weight_decay=weight_decay)
    guide = load_transformer(teacher, device=device).requires_grad_(False) if teacher else None
    update, state_file = 0, work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        update = state["update"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        if guide is not None:
            guide.compile_repeated_blocks(fullgraph=True, dynamic=False)
    weights, averages = list(model.parameters()), list(average.parameters())

    total, losses, started = sum(s.updates for s in stages), {"image": [], "video": []}, time.time()
    while update < total:
        stage, inside = _stage_of(stages, update)
        rng = np.random.default_rng([seed, 4, update])
        torch.manual_seed(seed * 1_000_003 + update)
        kind = "video" if rng.random() < stage.video else "image"
        latents, rows = pools[kind]
        batch = video_batch if kind == "video" else image_batch
        pick = torch.from_numpy(rng.integers(len(latents), size=batch)).to(device)
        # Replace 1 in 10 captions, half by the negative prompt and half by an empty one, so that the model
        # learns both as "any caption".
        lost = torch.rand(batch, device=device)
        text_rows = torch.where(lost < text_dropout, (lost < text_dropout / 2).long(), rows[pick])
        x, c = latents[pick], table[text_rows]
        t = shift(
            (torch.randperm(batch, device=device) + torch.rand(batch, device=device)) / batch, SHIFT[kind]
        )
        z = torch.randn_like(x)
        x_t, wanted = interpolate(x, z, t), velocity(x, z)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            if guide is not None:
                with torch.no_grad():
                    wanted = predict_velocity(guide, x_t, t, c)
            error = predict_velocity(model, x_t, t, c) - wanted
        loss = error.pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = (stage.lr + (stage.lr_end - stage.lr) * inside) * min(
            1.0, (update + 1) / 300
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update += 1
        torch._foreach_lerp_(averages, weights, 1 - min(ema_decay, update / (update + EMA_WARMUP)))
        losses[kind].append(loss.detach())
        if update % 250 == 0:
            means = {k: round(float(torch.stack(v).mean()), 4) for k, v in losses.items() if v}
            report(f"base {update}/{total}: {means}, {(time.time() - started) / 250 * 1e3:.0f} ms an update")
            losses, started = {"image": [], "video": []}, time.time()
        if update % 500 == 0 or update == total:
            last = {kind: values[-1] for kind, values in losses.items() if values}
            state = {
                "update": update,
                "loss": last,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            with replacing(state_file) as part:
                torch.save(state, part)
        if update % judge_every == 0 or update == total:
            for judged in ("image", "video"):
                figures = judge_base(average, vae, captions, judged, count=judge_count, device=device)
                report(f"base {update} {judged}: {json.dumps(figures)}")
            report(f"base {update}: kernels of {kernel_sizes(average)}")
            started = time.time()
    metadata = {
        "kind": "base",
        "base": "mini",
        "updates": update,
        "ema": ema_decay,
        "ema_warmup": EMA_WARMUP,
        "text_length": text.text_length,
    }
    save_generator(out, average, config, metadata, torch.float32)
    return average


def kernel_sizes(model: torch.nn.Module) -> str:
    """A network's smallest and largest matrix by root mean square, as "0.02 (name) to 0.17 (name)"."""
    sizes = {
        name: float(p.detach().float().square().mean().sqrt())
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    return " to ".join(
        f"{sizes[name]:.3f} ({name})" for name in (min(sizes, key=sizes.get), max(sizes, key=sizes.get))
    )


def _stage_of(stages: tuple[Stage, ...], update: int) -> tuple[Stage, float]:
    for stage in stages:
        if update < stage.updates:
            return stage, update / stage.updates
        update -= stage.updates
    raise ValueError("past the last stage")


@torch.no_grad()
def judge_base(
    model,
    vae,
    captions: Captions,
    kind: str,
    *,
    count: int = 64,
    guidance: float = GUIDANCE,
    steps: int = 25,
    seed: int = 99,
    device="cpu",
):
    """Judge guided samples of the base: the shares that show what their captions say, and that are intact."""
    scenes = draw(seed, range(count), moving=kind == "video")[1]
    c = captions.table[[captions.rows[s.caption] for s in scenes]].to(device)
    negative = captions.table[[0] * count].to(device)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((count, 16, 3 if kind == "video" else 1, 6, 6), generator=generator).to(device)
    latents = euler_cfg(model, z, c, negative, steps=steps, scale=guidance, shift=SHIFT[kind])
    pixels = torch.cat([decode(vae, part) for part in latents.split(16)])
    clips = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    readings = [read_clip(clip) for clip in clips]
    words = [r.agrees(s) for r, s in zip(readings, scenes)]
    shares = {key: round(float(np.mean([w[key] for w in words])), 3) for key in words[0]}
    return {**shares, "structure": round(float(np.mean([r.structure for r in readings])), 3)}
