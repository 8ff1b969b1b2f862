"""APT One-Step Sampler in a real ComfyUI: the numbers of apt_core and of stock KSampler, and what it says to
bad input.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stand_ins import save_plain
from tiny_models import tiny_wan_16
from torch.testing import assert_close

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.loading.checkpoint import save_generator
from apt_core.loading.sources import Sources, TextSource, VaeSource, read_transformer
from apt_core.loading.text_files import TextFacts
from apt_core.method.generator import few_step, one_step
from apt_core.method.noise import draw
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD

PACK = Path(__file__).parents[2]
SEED = 40
MEAN, STD = (torch.tensor(values["2.1"]).view(-1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))


def noise(seed: int, steps: int = 1) -> list[torch.Tensor]:
    """[1, C, F, H, W] for each step: one generator per item, drawn from again for each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 16, 2, 6, 4, generator=generator) for _ in range(steps)]


@pytest.fixture(scope="module")
def generator():
    return tiny_wan_16(2).requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    return torch.randn(1, 7, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("sampler") / "files"


@pytest.fixture(scope="module")
def run(comfyui, generator, text, files):
    """(latents by name as the transformer has them, the rest of the result)"""
    folder = files.parent
    for name, about in (
        ("model", {}),
        ("early", {"second_time": 0.4}),
        ("base", {"kind": "base", "second_time": 0.5}),
    ):
        save_generator(files / f"{name}.safetensors", generator, generator.config, {"base": "test"} | about)

    save_plain(files / "plain.safetensors", files / "model.safetensors")
    lengths = {"base": "test", "text_length": 7}, {"base": "test", "text_length": 6}
    for name, about in zip(("long enough", "too short"), lengths):
        save_generator(files / f"{name}.safetensors", generator, generator.config, about)

    key, down, up = "blocks.1.self_attn.q", torch.randn(4, 48) / 7, torch.randn(48, 4) / 2
    lora = {f"diffusion_model.{key}.lora_A.weight": down, f"diffusion_model.{key}.lora_B.weight": up}
    save_file(
        lora,
        files / "lora.safetensors",
        {"apt": json.dumps({"format": 1, "kind": "lora", "second_time": 0.3})},
    )
    tables = {
        f"diffusion_model.{name}.modulation.diff": torch.randn(1, rows, 48)
        for name, rows in (("blocks.0", 6), ("blocks.1", 6), ("head", 2))
    }
    save_file(lora | tables, files / "tables.safetensors")
    merged = {name: value.clone() for name, value in generator.state_dict().items()}
    merged["blocks.1.attn1.to_q.weight"] += up @ down
    save_generator(files / "merged.safetensors", merged, generator.config, {"base": "test"})

    broken = load_file(files / "model.safetensors")
    broken["head.head.weight"][0] = torch.nan
    with safe_open(files / "model.safetensors", "pt") as model:
        save_file(broken, files / "not finite.safetensors", model.metadata())
        wrong = model.metadata() | {"apt": json.dumps({"format": 1, "kind": "generator", "second_time": 700})}
        save_file(load_file(files / "model.safetensors"), files / "wrong.safetensors", wrong)

    save_file({"text": text}, folder / "in.safetensors")
    result = comfyui(
        "sample_nodes",
        pack=PACK,
        files=files,
        inputs=folder / "in.safetensors",
        out=folder / "out.safetensors",
    )
    return {
        name: (value - MEAN) / STD for name, value in load_file(folder / "out.safetensors").items()
    }, result


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close(a, b, rtol=0, atol=1e-5)


def test_one_step_is_ksamplers_and_apt_cores(run, generator, text):
    latents, result = run
    close(latents["one"], one_step(generator, *noise(SEED), text))
    for other in ("stock", "stock loader", "stock empty", "shifted"):
        assert torch.equal(latents["one"], latents[other]), other
    close(latents["masked"], latents["stock masked"])
    assert (latents["masked"] - latents["one"]).abs().max() > 0.1
    assert result["timesteps"][0] == [1000.0]


def test_an_image_is_one_frame(run, generator, text):
    z = torch.randn(1, 16, 1, 6, 4, generator=torch.Generator().manual_seed(SEED))
    close(run[0]["image"], one_step(generator, z, text))


def test_each_item_of_a_batch_has_its_own_seed(run, generator, text):
    latents, _ = run
    for item in range(3):
        close(latents["batch"][item : item + 1], one_step(generator, *noise(SEED + item), text))
    close(latents["batch"][2:], latents["alone"])
    assert torch.equal(latents["cut"], latents["alone"])


def test_a_few_steps_are_apt_cores(run, generator, text):
    latents, result = run
    for item in range(2):
        z, *fresh = noise(SEED + item, 2)
        close(
            latents["two"][item : item + 1], few_step(generator, z, text, (1.0, 0.7), lambda i: fresh[i - 1])
        )
    z, *fresh = noise(SEED, 3)
    close(latents["times"], few_step(generator, z, text, (1.0, 0.75, 0.25), lambda i: fresh[i - 1]))
    assert torch.equal(latents["times"], latents["times without 0"])
    assert result["timesteps"][1] == pytest.approx([1000, 700], abs=1e-3)
    assert result["timesteps"][2] == pytest.approx([1000, 875, 700, 437.5], abs=1e-3)


def test_presets_have_the_times_of_ksampler_under_the_shift(run, generator, text):
    latents, result = run
    assert result["presets"]["5"] == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-3)
    assert result["presets"]["8"] == pytest.approx([1000, 960, 8000 / 9, 8000 / 11], abs=1e-3)
    for shift in ("5", "8"):
        assert result["presets"][shift] == pytest.approx(result["KSampler's"][shift], abs=1e-2)
    assert result["sigmas before preset"] == pytest.approx([1000, 500], abs=1e-3)
    z, *fresh = noise(SEED, 4)
    close(
        latents["shift 5"], few_step(generator, z, text, (1.0, 0.9375, 5 / 6, 0.625), lambda i: fresh[i - 1])
    )


@pytest.mark.parametrize("file", ["model", "early"])
@pytest.mark.parametrize("rule", ["apt", "comfyui"])
def test_every_steps_and_noise_are_the_pipelines(run, text, files, file, rule):
    """The pipeline on the same file, seed, steps and noise; `generate` writes what the pipeline makes."""
    latents, _ = run
    parts = VaeSource("none", 16, (4, 8, 8), 0, None), TextSource("none", TextFacts(20, 0, (), None), None)
    pipe = OneStepPipeline(Sources(read_transformer(files / f"{file}.safetensors"), *parts))
    for steps in (1, 2, 3):
        made = latents[f"{'early ' * (file == 'early')}{rule} {steps}"]
        request = pipe.request(
            "x", height=48, width=32, frames=5, fps=8, count=2, seed=SEED, steps=steps, noise=rule
        )
        for item in range(2):
            close(made[item : item + 1], pipe.latents(request, item, text))


def test_settings_change_what_they_name(run):
    latents, _ = run
    assert torch.equal(latents["comfyui 2"], latents["two"]), (
        "the default, and what a graph from before the setting has"
    )
    assert torch.equal(latents["early apt 1"], latents["apt 1"])
    for steps in (2, 3):
        assert (latents[f"early apt {steps}"] - latents[f"apt {steps}"]).abs().mean() > 0.05
    for steps in (1, 2, 3):
        assert (latents[f"comfyui {steps}"] - latents[f"apt {steps}"]).abs().mean() > 0.05
    close(latents["cut apt"], latents["apt 1"][1:])


def test_a_lora_on_a_base_brings_its_second_time(run):
    stock, base, *trained = run[1]["LoRA's timesteps"]
    assert stock == base == pytest.approx([1000, 300], abs=1e-3)
    model, early = pytest.approx([1000, 700], abs=1e-3), pytest.approx([1000, 400], abs=1e-3)
    assert trained == [model, early, early], "the last by the stock loader, whose file has the metadata"


def test_what_does_not_reach_the_model_is_told(run):
    no_input = "The {} is ignored: this model has no input for one."
    tables = (
        "3 tables (modulation) of a LoRA or merge are left out: ComfyUI cannot apply them. "
        "`python -m trainer export LORA --base BASE --out FILE` puts a LoRA into its base whole; "
        "load that file instead."
    )
    expected = {
        "a text that fits": [],
        "a text too long": [
            "The prompt is too long: 7 tokens, 6 at most in this model's training. The result can be noise, "
            "so shorten the prompt (a word has one to three tokens)."
        ],
        "a LoRA with tables": [tables],
        "a LoRA": [],
        "a merge": [tables],
        "images": [no_input.format("start image") + "\n" + no_input.format("CLIP vision image")],
        "an encoded picture": [
            "The picture in the latent is ignored: this method starts from noise alone. "
            "Take Empty APT Latent."
        ],
        "a picture to go on with": [],
    }
    assert run[1]["shown"] == {
        name: [[text, "APTSampler"] for text in texts] for name, texts in expected.items()
    }
    assert run[1]["taken away"] == [[" ", "APTSampler"]]


def halfway(a, b):
    """The middle of the arc from a to b."""
    middle = a / a.norm() + b / b.norm()
    return middle / middle.norm() * (a.norm() + b.norm()) / 2


def test_noise_given_replaces_that_of_the_seed(run, generator, text):
    latents, _ = run
    (z3, fresh3), (z8, fresh8) = noise(3, 2), noise(8, 2)
    walk = [(z3, fresh3), (halfway(z3, z8), halfway(fresh3, fresh8)), (z8, fresh8)]
    for item, (z, fresh) in enumerate(walk):
        close(latents["walk"][item : item + 1], few_step(generator, z, text, (1.0, 0.7), lambda i: fresh))
        close(latents["walk advanced"][item : item + 1], one_step(generator, z, text))
    # stock noise: one seed for the batch
    both = torch.randn(2, 16, 2, 6, 4, generator=torch.Generator().manual_seed(SEED))
    for item in range(2):
        fresh = noise(77 + item, 2)[1]
        close(
            latents["stock noise"][item : item + 1],
            few_step(generator, both[item : item + 1], text, (1.0, 0.7), lambda i: fresh),
        )
        fresh = draw("apt", 77, item, (16, 2, 6, 4), 1)[None]
        close(
            latents["stock noise apt"][item : item + 1],
            few_step(generator, both[item : item + 1], text, (1.0, 0.7), lambda i: fresh),
        )
    close(latents["no noise"], one_step(generator, torch.zeros(1, 16, 2, 6, 4), text))


def test_a_stock_lora_is_the_merged_weights(run):
    latents, _ = run
    # ComfyUI leaves a LoRA's tables out, which the node says (see "shown").
    assert torch.equal(latents["lora"], latents["lora with tables"])
    close(latents["lora"], latents["merged"])
    assert (latents["lora"] - latents["one"]).abs().max() > 1e-2
    assert torch.equal(latents["unpatched"], latents["one"])


def test_bad_input_gets_a_sentence(run):
    name = "AptError APT One-Step Sampler:"
    takes = (
        "but this model takes [batch, 16, frames, height, width]: "
        "make it with Empty APT Latent from this model."
    )
    sizes = "but this model takes sides in steps of 16:"
    order = "but they must start at 1 and decrease, staying above 0 until a last 0: for two steps 1, 0.7."
    second = (
        "its metadata entry `apt` has second_time 700, not a number between 0 and 1: export the file again."
    )
    out = "but APT is a flow at timestep 1000: take that Model Sampling node out."
    assert run[1]["sentences"] == {
        "channels": f"{name} the latent is [1, 48, 2, 6, 4], {takes}",
        "image": f"{name} the latent is [1, 16, 6, 4], {takes}",
        "odd": (
            f"{name} the latent is for 32x56 pixels, {sizes} 32x48 or 32x64 is nearest, "
            "make it with Empty APT Latent."
        ),
        "odd empty": (
            f"{name} the latent is for 8x56 pixels, {sizes} 16x48 or 16x64 is nearest, "
            "make it with Empty APT Latent."
        ),
        "text": (
            f"{name} the prompt has embeddings of 4096 channels, but this model reads 20: "
            "use its own text encoder, UMT5-XXL for Wan, apt_mini_text_encoder for the miniature."
        ),
        "start": f"{name} the sigmas are 0.9, 0.5, 0, {order}",
        "order": f"{name} the sigmas are 1, 0.5, 0.5, {order}",
        "empty": f"{name} the sigmas are empty, {order}",
        "timesteps": f"{name} the sigmas are 1000, 700, {order}",
        "not finite": (
            f"{name} 12 of 768 values of the sample are NaN or infinite: load the model with weight_dtype "
            "default or bf16, and if that is no help, its file or a LoRA on it is broken."
        ),
        "times 1": f"{name} a node made the model's sampling flow at timestep 1, {out}",
        "no flow": f"{name} a node made the model's sampling something other than a flow, {out}",
        "second time": f"AptError Load APT Checkpoint: /wrong.safetensors: {second}",
        "LoRA's second time": f"{name} the LoRA: {second}",
        "model": (
            f"{name} the model is Identity, but APT is for Wan: "
            "connect Load APT Checkpoint, or a loader with a Wan model."
        ),
    }


def test_a_walk_needs_different_seeds(run):
    start = 'AptError APT Noise Walk: seeds is "{}",'
    numbers = "but it must be two or more whole numbers from 0 with commas in between, such as 1, 2, 3."
    no_way = "but a seed cannot lead to itself: leave one of them out"
    assert run[1]["walks"] == {
        "5 closed": f"{start.format('5')} {numbers}",
        "1, -2": f"{start.format('1, -2')} {numbers}",
        "1, 18446744073709551616": f"{start.format('1, 18446744073709551616')} {numbers}",
        "1,,2": f"{start.format('1,,2')} {numbers}",
        "3, 4, 4": f"{start.format('3, 4, 4')} which goes from 4 to 4, {no_way}.",
        "1, 2, 1 closed": (
            f"{start.format('1, 2, 1')} which goes from 1 to 1, {no_way}, "
            "a closed walk returns to its first seed anyway."
        ),
    }
    assert run[1]["good walks"] == ["nothing was raised"] * 2
