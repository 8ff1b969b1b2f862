"""Prompts to video on the miniature: the same numbers as the parts give, and every mistake as one sentence
before a weight is read.
"""

import json
import math
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import double as in_double
from ranks import start

import apt_core
from apt_core.engine.decoder import Decoder
from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.residence import ALL, BLOCKS, PARTS
from apt_core.errors import AptError, OutOfMemory
from apt_core.files.checkpoint_header import read_metadata
from apt_core.loading import sources
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import save_generator
from apt_core.loading.sources import SHIPPED, TransformerSource
from apt_core.loading.text_files import load_text_encoder
from apt_core.method.flow import sample_noise
from apt_core.method.generator import euler_cfg, few_step, one_step
from apt_core.method.noise import draw
from apt_core.models.lora import add_adapters, role, save_lora
from apt_core.models.text import save_text_encoder
from apt_core.models.vae import decode, load_vae
from apt_core.models.wan import WanBackbone

MINI = {"vae": "mini", "text_encoder": "mini"}
SIZES = {"height": 48, "width": 48, "frames": 9, "fps": 8}
SIZE = {"height": 48, "width": 48, "frames": 5, "fps": 8}
PROMPT = "a red circle moving left on a green background"


def pipeline(**options) -> OneStepPipeline:
    return OneStepPipeline.from_checkpoint(SHIPPED["base"], **MINI, **options)


def by_hand(
    number: int = 0, seed: int = 0, prompt: str = PROMPT, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    text = load_text_encoder(SHIPPED["text_encoder"])
    z = sample_noise([number], (16, 2, 6, 6), seed, "generate/z")
    with torch.no_grad():
        return one_step(
            load_backbone(SHIPPED["base"], dtype).eval(),
            z.to(dtype),
            text.pad(text.encode([prompt]), text.text_length).to(dtype),
        )


def exactly(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In fp64."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def as_bytes(latents: torch.Tensor) -> np.ndarray:
    pixels = decode(load_vae(SHIPPED["vae"], latents.dtype), latents)[0].clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Rounding to bytes may go either way where two computations differ by a millionth."""
    difference = np.abs(found.astype(int) - expected)
    return found.shape == expected.shape and difference.max() <= 1 and difference.mean() < 0.01


def test_one_step_is_what_its_parts_compute(tmp_path):
    pipe = pipeline(cache=tmp_path)
    video = pipe(PROMPT, seed=3, **SIZE)
    assert (
        video.frames.dtype == np.uint8 and video.frames.std() > 5 and (video.fps, video.prompt) == (8, PROMPT)
    )
    assert close(video.frames, as_bytes(by_hand(seed=3)))
    assert close(np.concatenate(list(pipe.stream(PROMPT, seed=3, **SIZE))), video.frames)


def test_many_prompts(tmp_path):
    pipe = pipeline(cache=tmp_path)
    videos = pipe([PROMPT, "a blue square"], count=2, **SIZE)
    assert [(video.prompt, video.number) for video in videos] == [
        (PROMPT, 0),
        (PROMPT, 1),
        ("a blue square", 2),
        ("a blue square", 3),
    ]
    assert close(videos[3].frames, as_bytes(by_hand(3, prompt="a blue square")))


def copy_with(path, **metadata):
    """The shipped generator with other metadata."""
    model = load_backbone(SHIPPED["checkpoint"])
    save_generator(path, model, model.config, read_metadata(SHIPPED["checkpoint"]) | metadata)
    return path


@pytest.mark.parametrize(
    "about, times",
    [
        ({}, [(1.0,), (1.0, 0.7), (1.0, 14 / 17, 7 / 13)]),
        ({"phase": "distilled"}, [(1.0,), (1.0, 0.7), (1.0, 14 / 17, 7 / 13)]),
        ({"second_time": 0.4}, [(1.0,), (1.0, 0.4), (1.0, 4 / 7, 0.25)]),
    ],
)
def test_steps_of_an_apt_or_distilled_file_add_noise_again_up_to_its_times(about, times, tmp_path):
    file = copy_with(tmp_path / "model.safetensors", **about)
    pipe, model = OneStepPipeline.from_checkpoint(file, cache=tmp_path), load_backbone(file).eval()
    text = pipe.embed(pipe.request(PROMPT, **SIZE))
    for noise in ("apt", "comfyui"):
        fresh = [draw(noise, 3, 1, (16, 2, 6, 6), step)[None] for step in range(3)]
        for expected in times:
            request = pipe.request(PROMPT, steps=len(expected), seed=3, count=2, noise=noise, **SIZE)
            wanted = few_step(model, fresh[0], text, expected, fresh.__getitem__)
            torch.testing.assert_close(pipe.latents(request, 1, text), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_of_a_base_are_eulers(guidance, tmp_path):
    pipe, model = pipeline(cache=tmp_path), load_backbone(SHIPPED["base"]).eval()
    for steps in (1, 2, 3):
        request = pipe.request(
            PROMPT,
            steps=steps,
            guidance=guidance,
            shift=3.0,
            negative="blurry",
            noise="comfyui",
            seed=2**40,
            **SIZE,
        )
        text = pipe.embed(request)
        z = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(2**40))
        wanted = euler_cfg(model, z, text[:1], text[1:], steps, guidance, 3.0)
        torch.testing.assert_close(pipe.latents(request, 0, text), wanted, rtol=0, atol=1e-5)


def test_what_is_for_bases_alone_is_refused_for_an_apt_file():
    pipe = OneStepPipeline.from_checkpoint("mini")
    for wish, value in (("guidance", 7.5), ("shift", 3.0), ("negative", "blurry")):
        with pytest.raises(AptError) as error:
            pipe.request(PROMPT, **{wish: value})
        assert (
            str(error.value)
            == f"{wish} {value!r} is for base models, but {SHIPPED['checkpoint']} is an APT or distilled"
            " one, "
            f"which has no {wish}: leave it out."
        )


def test_files(tmp_path):
    pipe = pipeline(cache=tmp_path / "cache")
    video = pipe(PROMPT, **SIZE)
    video.save(tmp_path / "saved.mp4")
    pipe.write(PROMPT, tmp_path / "written.mp4", **SIZE)
    assert (tmp_path / "saved.mp4").read_bytes() == (tmp_path / "written.mp4").read_bytes()
    with av.open(tmp_path / "written.mp4") as container:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert shown.shape == video.frames.shape and np.abs(shown.astype(int) - video.frames).mean() < 6
    picture = pipe(PROMPT, **SIZE | {"frames": 1})
    picture.save(tmp_path / "a.png")
    about = {"prompt": PROMPT, "seed": 0, "number": 0}
    with av.open(tmp_path / "saved.mp4") as container, Image.open(tmp_path / "a.png") as image:
        assert json.loads(container.metadata["comment"]) == json.loads(image.info["comment"]) == about
    assert picture.fps == 0 and np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture.frames[0])
    with pytest.raises(AptError, match=r"a\.avi: videos are written as \.mp4"):
        pipe.write(PROMPT, tmp_path / "a.avi", **SIZE)


def test_a_lora_is_merged_into_its_base(double, tmp_path):
    torch.manual_seed(0)
    adapted = add_adapters(load_backbone(SHIPPED["base"]), ["generator"], rank=3)
    for p in role(adapted, "generator").parameters():
        torch.nn.init.normal_(p, std=0.05)
    save_lora(tmp_path / "lora.safetensors", adapted, "generator", {"base": "mini"})
    with pytest.raises(AptError, match=r"is a LoRA: add base=PATH of the transformer that it belongs to\.$"):
        OneStepPipeline.from_checkpoint(tmp_path / "lora.safetensors")
    pipe = OneStepPipeline.from_checkpoint(
        tmp_path / "lora.safetensors", base="mini", cache=tmp_path, dtype=torch.float64
    )
    request = pipe.request(PROMPT, **SIZE)
    text = pipe.embed(request).double()
    with torch.no_grad():
        expected = one_step(
            role(adapted.double().eval(), "generator"),
            sample_noise([0], (16, 2, 6, 6), 0, "generate/z").double(),
            text,
        )
    assert (expected - by_hand(dtype=torch.float64)).abs().max() > 0.1
    # The product of the file's factors is rounded to fp32 before it is added: 6e-8 of numbers below 0.1.
    torch.testing.assert_close(pipe.latents(request, 0, text), expected, rtol=0, atol=1e-7)


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a weight is an error."""

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(sources, name, refuse)
    real = sources.load_backbone

    def shape_alone(path, dtype=torch.float32, device="cpu"):
        return real(path, dtype, device) if device == "meta" else refuse()

    monkeypatch.setattr(sources, "load_backbone", shape_alone)


def other_model(path, **changes):
    config = (
        dict(num_attention_heads=2, attention_head_dim=12, text_dim=96, freq_dim=16, ffn_dim=32, num_layers=1)
        | changes
    )
    save_generator(path, WanBackbone(**config), config, {})
    return path


def test_every_mistake_is_a_sentence_before_a_weight_is_read(tmp_path, no_weights):
    pipe = pipeline()
    for wishes, sentence in (
        (
            {"height": 50},
            "a sample of 48x50 and 5 frames does not fit: height 50 must be a multiple of 16 (48 or 64).",
        ),
        ({"frames": 6}, "a sample of 48x48 and 6 frames does not fit: frames 6 must be 4 n + 1 (5 or 9)."),
        ({"height": 0}, "height 0 must be a multiple of 16 (16)"),
        ({"steps": 0}, "1 samples in 0 steps cannot be made: both must be 1 or more."),
        ({"fps": 0}, "fps is 0, but a video has 0.1 to 240 frames a second."),
        ({"fps": float("nan")}, "fps is nan, but must be a finite number."),
        ({"frames": 9.0}, "frames is 9.0, but must be a whole number."),
        ({"seed": "x"}, "seed is 'x', but must be a whole number."),
        ({"count": None}, "count is None, but must be a whole number."),
        ({"guidance": float("nan"), "steps": 3}, "guidance is nan, but must be a finite number."),
        ({"shift": -1.0}, "shift is -1, but must be above 0."),
        ({"noise": "gpu"}, "noise 'gpu' is not known: use apt or comfyui."),
        (
            {"negative": "\ud800"},
            "the prompt '\\ud800' cannot be read: give text that can be written as UTF-8.",
        ),
    ):
        with pytest.raises(AptError) as error:
            pipe(PROMPT, **SIZE | wishes)
        assert sentence in str(error.value) and str(error.value).count(". ") == 0
    with pytest.raises(AptError, match="there is no prompt"):
        pipe([])
    for make in (
        lambda: pipe.stream([PROMPT, PROMPT]),
        lambda: pipe.write(PROMPT, tmp_path / "a.mp4", count=2),
    ):
        with pytest.raises(
            AptError,
            match="^2 samples were asked for where one can be made: call the pipeline itself for many",
        ):
            make()
    for prompt in (None, [3], b"red"):
        with pytest.raises(AptError, match="cannot be read: give text that can be written as UTF-8"):
            pipe(prompt)
    for memory in (0, -1.0, float("nan"), "8"):
        with pytest.raises(
            AptError,
            match=r"^memory is .*, but must be a number of GiB above 0, or None for all that is free\.$",
        ):
            pipeline(memory=memory)
    with pytest.raises(
        AptError,
        match=r"^there is no attention backend 'flush' \(did you mean flash\?\): use auto, or one of ",
    ):
        pipeline(backend="flush")
    for name, frames in (("a.avi", 5), ("a.gif", 1), ("a.mp4", 1)):
        with pytest.raises(AptError, match=rf"{name}: "):
            pipe.write(PROMPT, tmp_path / name, **SIZE | {"frames": frames})
    wide = other_model(tmp_path / "wide.safetensors", in_channels=48, out_channels=48)
    deaf = other_model(tmp_path / "deaf.safetensors", text_dim=64)
    for path, options, sentence in (
        (wide, MINI, f"has 16 channels, but {wide} makes latents of 48: give that model's VAE."),
        (deaf, MINI, f"has width 96, but {deaf} wants 64: give that model's text encoder."),
        (deaf, {"text_encoder": "mini"}, "vae is not given: add vae=PATH of the VAE"),
        (deaf, {"vae": "mini"}, "text_encoder is not given: add text_encoder=PATH of the UMT5 encoder"),
        (deaf, MINI | {"vae": SHIPPED["text_encoder"]}, "is not a Wan VAE"),
        (deaf, MINI | {"text_encoder": SHIPPED["vae"]}, "is not a UMT5 encoder"),
        (tmp_path / "gone", MINI, "gone does not exist: give the path of a checkpoint or LoRA file"),
        (SHIPPED["vae"], MINI, ""),
    ):
        with pytest.raises(AptError) as error:
            OneStepPipeline.from_checkpoint(path, **options)
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"native": [48, 48]}, r"native [48, 48], not width, height, frames and fps"),
        (
            {"native": SIZES | {"height": 48.0}},
            f"native {SIZES | {'height': 48.0}}, not width, height, frames and fps",
        ),
        (
            {"native": SIZES | {"frames": "9"}},
            f"native {SIZES | {'frames': '9'}}, not width, height, frames and fps",
        ),
        (
            {"native": SIZES | {"fps": None}},
            f"native {SIZES | {'fps': None}}, not width, height, frames and fps",
        ),
        (
            {"native": SIZES | {"fps": math.inf}},
            f"native {SIZES | {'fps': math.inf}}, not width, height, frames and fps",
        ),
        ({"native": {"height": 48}}, "native {'height': 48}, not width, height, frames and fps"),
        ({"text_length": "32"}, "text_length '32', not a whole number from 1"),
        ({"text_length": 0}, "text_length 0, not a whole number from 1"),
    ],
)
def test_sizes_of_a_checkpoint_that_are_none(metadata, said):
    with pytest.raises(AptError) as error:
        TransformerSource("odd", {}, metadata, 0, print)
    assert str(error.value) == f"odd: its metadata entry `apt` has {said}: export the file again."


def test_a_text_encoder_without_its_tokenizer_is_refused_at_once(tmp_path, no_weights):
    encoder = load_text_encoder(SHIPPED["text_encoder"])
    save_text_encoder(tmp_path / "text.safetensors", encoder.model, b"", 32)
    from safetensors.torch import load_file, save_file

    tensors = {
        key: value for key, value in load_file(tmp_path / "text.safetensors").items() if key != "spiece_model"
    }
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(AptError, match="carries no tokenizer: add tokenizer=PATH"):
        OneStepPipeline.from_checkpoint(
            SHIPPED["base"], vae="mini", text_encoder=tmp_path / "bare.safetensors"
        )


def fail_times(monkeypatch, times: int) -> list[int]:
    """The transformer runs out of memory in its first calls."""
    calls, real = [], WanBackbone.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(WanBackbone, "forward", forward)
    return calls


@pytest.mark.parametrize("times, level", [(0, ALL), (1, PARTS), (2, BLOCKS)])
def test_out_of_memory_in_the_transformer(double, times, level, monkeypatch, tmp_path):
    said = []
    pipe = pipeline(cache=tmp_path, report=said.append, dtype=torch.float64)
    request = pipe.request(PROMPT, **SIZE)
    text = pipe.embed(request).double()
    fail_times(monkeypatch, times)
    latents = pipe.latents(request, 0, text)
    exactly(latents, by_hand(dtype=torch.float64))
    assert pipe.residence.level == level and len(said) == times and pipe.steps_taken == said
    # it stays there, and says nothing twice
    assert torch.equal(pipe.latents(request, 0, text), latents) and len(said) == times
    assert close(pipe(PROMPT, **SIZE).frames, as_bytes(by_hand(dtype=torch.float64)))


def test_a_budget_is_for_weights_and_decode_together(tmp_path):
    for memory, level in ((1.0, ALL), (0.015, PARTS)):
        pipe = OneStepPipeline.from_checkpoint("mini", cache=tmp_path, memory=memory)
        assert pipe.residence.level == level
        pipe(PROMPT, **SIZE | {"frames": 1})
        weights = pipe._weights()
        assert pipe._beside_weights() == int(memory * 2**30) - (
            sum(weights.values()) if level == ALL else weights["vae"]
        )


def test_the_noise_of_the_next_sample_is_drawn_ahead(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "apt_core.engine.pipeline.draw",
        lambda rule, seed, number, shape: drawn.append(number) or draw(rule, seed, number, shape),
    )
    pipe = pipeline(cache=tmp_path)
    videos = pipe(PROMPT, count=3, **SIZE)
    assert drawn == [0, 1, 2] and close(videos[2].frames, as_bytes(by_hand(2)))


def test_out_of_memory_that_nothing_helps(monkeypatch, tmp_path):
    pipe = pipeline(cache=tmp_path, report=lambda _: None)
    fail_times(monkeypatch, 3)
    with pytest.raises(
        OutOfMemory,
        match=(
            "runs out of memory even with a single block of a network on it: "
            "ask for fewer frames or a smaller size"
        ),
    ):
        pipe(PROMPT, **SIZE)


def test_importing_the_package_stays_light():
    code = (
        "import sys, apt_core; slow = {'torch', 'diffusers', 'transformers', 'av'} & set(sys.modules); "
        "assert not slow, slow; apt_core.OneStepPipeline; assert 'diffusers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert apt_core.OneStepPipeline is OneStepPipeline
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        apt_core.Nothing


def together(group, folder) -> None:
    with in_double():
        pipe = pipeline(group=group, cache=folder, dtype=torch.float64)
        request = pipe.request(PROMPT, **SIZE)
        latents = pipe.latents(request, 0, pipe.embed(request).double())
        frames = np.concatenate(list(pipe.frames(latents)))
        # as the pipeline does, before they are bytes
        pixels = Decoder(load_vae(SHIPPED["vae"], torch.float64), group=group).decode(latents)
    torch.save((latents, pixels, torch.from_numpy(frames)), folder / f"{group.rank()}.pt")


@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_make_one_clip(double, size, tmp_path):
    start(size, together, tmp_path, preload=("apt_core.engine.pipeline",))
    expected = by_hand(dtype=torch.float64)
    whole = decode(load_vae(SHIPPED["vae"], torch.float64), expected).movedim(1, -1)
    for rank in range(size):
        latents, pixels, frames = torch.load(tmp_path / f"{rank}.pt")
        exactly(latents, expected)
        exactly(pixels, whole.clamp(-1, 1))
        assert close(frames.numpy(), as_bytes(expected))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"device": "nope"}, "torch cannot use the device 'nope' here"),
        ({"dtype": "bf16"}, "dtype is 'bf16', but must be one of torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8, but must be one of"),
        ({"tiny_decoder": "mini"}, "tiny_decoder mini does not exist"),
        ({"backend": "nosuch"}, "there is no attention backend 'nosuch'"),
        ({"memory": "much"}, "memory is 'much', but must be a number of GiB above 0"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options, word):
    with pytest.raises(AptError, match=word):
        OneStepPipeline.from_checkpoint("mini", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(AptError, match="torch cannot use the device 'cuda' here"):
        OneStepPipeline.from_checkpoint("mini", device="cuda")
