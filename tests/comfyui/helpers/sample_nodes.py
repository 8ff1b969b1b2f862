"""APT One-Step Sampler with the generator `model` in `files` and the text in `inputs`, beside stock nodes;
all latents into `out`.
"""

import json
from types import SimpleNamespace

from comfyui import start

paths, _ = start()

import comfy.samplers
import torch
from apt_nodes import load_nodes, offer, sentence, show_on_nodes
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicGuider, DisableNoise, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow, ModelSamplingDiscrete, ModelSamplingSD3
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from safetensors.torch import load_file, save_file

import nodes

apt = load_nodes(paths["pack"])
offer(paths["files"], "diffusion_models", "loras")
on_node = show_on_nodes(apt)
WIDTH, HEIGHT, FRAMES, SEED = 32, 48, 5, 40


def load(name: str):
    return apt.APTLoadCheckpoint.execute(name, "default").args[0]


def empty(batch: int, frames: int = FRAMES) -> dict:
    return apt.APTEmptyLatent.execute(
        model, {"size": "custom", "width": WIDTH, "height": HEIGHT, "frames": frames}, batch
    ).args[0]


def sample(model, latent: dict, seed: int = SEED, steps: int = 1, **more) -> torch.Tensor:
    out = apt.APTSampler.execute(model, cond, latent, seed, steps, **more).args[0]
    assert not any(key.startswith("downscale") for key in out), "these keys are for empty latents"
    return out["samples"]


def stock(model, latent: dict, seed: int = SEED) -> torch.Tensor:
    return nodes.common_ksampler(model, seed, 1, 1.0, "euler", "simple", cond, cond, latent)[0]["samples"]


def simple(model) -> list[float]:
    """Timesteps of KSampler with 4 steps and simple."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    return (1000 * sigmas[:-1]).tolist()


def with_lora(model, name: str = "lora.safetensors"):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]


def timesteps(steps: int, model, **more) -> list[float]:
    """What the network itself is told."""
    seen, spied = [], model.clone()
    spied.add_wrapper(
        WrappersMP.DIFFUSION_MODEL,
        lambda executor, x, t, *rest, **more: (seen.extend(t.tolist()), executor(x, t, *rest, **more))[1],
    )
    sample(spied, empty(1), steps=steps, **more)
    return seen


with torch.inference_mode():
    model = load("model.safetensors")
    cond = [[load_file(paths["inputs"])["text"], {}]]
    filled = {
        "samples": torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(9)),
        "noise_mask": torch.zeros(1, 48, 32),
    }
    filled["noise_mask"][..., :20] = 1
    batch = {"samples": torch.zeros(3, 16, 2, 6, 4)}
    walk = apt.APTNoiseWalk.execute("3, 8", False).args[0]
    guider = BasicGuider.execute(model, cond).args[0]
    sampler, once = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])

    out = {
        "one": sample(model, empty(1)),
        "stock": stock(model, empty(1)),
        "stock loader": stock(nodes.UNETLoader().load_unet("model.safetensors", "default")[0], empty(1)),
        "masked": sample(model, filled),
        "stock masked": stock(model, filled),
        "batch": sample(model, batch),
        "alone": sample(model, empty(1), SEED + 2),
        "cut": sample(model, nodes.LatentFromBatch().frombatch(batch, 2, 1)[0]),
        "two": sample(model, empty(2), steps=2),
        "times": sample(model, empty(1), sigmas=torch.tensor([1, 0.75, 0.25, 0])),
        "times without 0": sample(model, empty(1), sigmas=torch.tensor([1, 0.75, 0.25])),
        "shift 5": sample(model, empty(1), times="4 steps, shift 5"),
        "walk": sample(model, empty(3), noise=walk, steps=2),
        "stock noise": sample(model, empty(2), 77, 2, noise=RandomNoise.execute(SEED).args[0]),
        "no noise": sample(model, empty(1), noise=DisableNoise.execute().args[0]),
        "walk advanced": SamplerCustomAdvanced.execute(
            walk, guider, sampler, once, {"samples": torch.zeros(3, 16, 2, 6, 4)}
        ).args[0]["samples"],
        "stock empty": sample(model, EmptyHunyuanLatentVideo.execute(WIDTH, HEIGHT, FRAMES).args[0]),
        "image": sample(model, EmptySD3LatentImage.execute(WIDTH, HEIGHT).args[0]),
        "shifted": sample(ModelSamplingSD3().patch(model, 3.0)[0], empty(1)),
        "lora": sample(with_lora(model), empty(1)),
        "lora with tables": sample(with_lora(model, "tables.safetensors"), empty(1)),
        "merged": sample(load("merged.safetensors"), empty(1)),
        "unpatched": sample(model, empty(1)),
    }
    for steps in (1, 2, 3):
        for rule in ("apt", "comfyui"):
            out[f"{rule} {steps}"] = sample(model, empty(2), steps=steps, seed_noise=rule)
            out[f"early {rule} {steps}"] = sample(
                load("early.safetensors"), empty(2), steps=steps, seed_noise=rule
            )
    out["cut apt"] = sample(model, nodes.LatentFromBatch().frombatch(empty(2), 1, 1)[0], seed_noise="apt")
    out["stock noise apt"] = sample(
        model, empty(2), 77, 2, noise=RandomNoise.execute(SEED).args[0], seed_noise="apt"
    )
    stock_loader = nodes.UNETLoader().load_unet
    late = (
        stock_loader("plain.safetensors", "default")[0],
        load("base.safetensors"),
        model,
        load("early.safetensors"),
    )
    late += stock_loader("early.safetensors", "default")
    broken = late[0].clone()
    broken.set_attachments("lora_metadata", {"apt": '{"second_time": 700}'})
    save_file({name: value.contiguous() for name, value in out.items()}, paths["out"])

    model_without, taken_away = model, []

    def shown(model, latent=None, positive=cond) -> list:
        on_node.clear()
        output = apt.APTSampler.execute(model, positive, latent or empty(1), SEED, 1)
        assert list(output.ui.as_dict()["text"] if output.ui else []) == [text for text, _ in on_node]
        first = list(on_node)
        if first:  # the next run of the same node, with nothing to say
            on_node.clear()
            assert apt.APTSampler.execute(model_without, cond, empty(1), SEED, 1).ui is None
            taken_away[:] = list(on_node)
        return first

    def says(latent=None, text=None, model=model, **more) -> str:
        return sentence(apt.APTSampler.execute, model, text or cond, latent or empty(1), 0, 1, **more)

    images = {
        "concat_latent_image": torch.zeros(1, 16, 2, 6, 4),
        "clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.zeros(1, 257, 1280)),
    }
    result = {
        "shown": {
            "a text that fits": shown(load("long enough.safetensors")),
            "a text too long": shown(load("too short.safetensors")),
            "a LoRA with tables": shown(with_lora(model, "tables.safetensors")),
            "a LoRA": shown(with_lora(model)),
            "a merge": shown(ModelMergeSimple().merge(model, load("merged.safetensors"), 0.5)[0]),
            "images": shown(model, positive=[[cond[0][0], images]]),
            "an encoded picture": shown(model, {"samples": filled["samples"]}),
            "a picture to go on with": shown(model, filled),
        },
        "timesteps": [timesteps(steps, model) for steps in (1, 2, 4)],
        "presets": {shift: timesteps(1, model, times=f"4 steps, shift {shift}") for shift in (5, 8)},
        "KSampler's": {shift: simple(ModelSamplingSD3().patch(model, float(shift))[0]) for shift in (5, 8)},
        "sigmas before preset": timesteps(
            1, model, times="4 steps, shift 5", sigmas=torch.tensor([1.0, 0.5])
        ),
        "LoRA's timesteps": [timesteps(2, with_lora(under)) for under in late],
        "sentences": {
            "channels": says({"samples": torch.zeros(1, 48, 2, 6, 4)}),
            "image": says({"samples": torch.zeros(1, 16, 6, 4)}),
            "odd": says({"samples": torch.zeros(1, 16, 2, 7, 4)}),
            "odd empty": says({"samples": torch.zeros(1, 16, 2, 7, 1), "downscale_ratio_spacial": 8}),
            "text": says(text=[[torch.zeros(1, 4, 4096), {}]]),
            "start": says(sigmas=torch.tensor([0.9, 0.5, 0])),
            "order": says(sigmas=torch.tensor([1, 0.5, 0.5])),
            "empty": says(sigmas=torch.tensor([])),
            "timesteps": says(sigmas=torch.tensor([1000.0, 700])),
            "not finite": says(model=load("not finite.safetensors")),
            "times 1": says(model=ModelSamplingAuraFlow().patch_aura(model, 3.0)[0]),
            "no flow": says(model=ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]),
            "second time": sentence(load, "wrong.safetensors").replace(paths["files"], ""),
            "LoRA's second time": says(model=broken),
            "model": says(model=SimpleNamespace(model=torch.nn.Identity())),
        },
        "taken away": taken_away,
        "walks": {
            f"{seeds}{' closed' * closed}": sentence(apt.APTNoiseWalk.execute, seeds, closed)
            for seeds, closed in (
                ("5", True),
                ("1, -2", False),
                (f"1, {2**64}", False),
                ("1,,2", False),
                ("3, 4, 4", False),
                ("1, 2, 1", True),
            )
        },
        "good walks": [
            sentence(apt.APTNoiseWalk.execute, *walk)
            for walk in (("1, 2, 1", False), (f" 0,{2**64 - 1} ", True))
        ],
    }
print(json.dumps(result))
