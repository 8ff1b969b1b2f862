"""Load APT Checkpoint in a real ComfyUI: weights, dtypes, warnings, and what it says to files that it cannot
take.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_wan_16
from torch.testing import assert_close

from apt_core.files.keys import transformer_to_official
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.wan_config import comfy_config
from apt_core.method.generator import one_step
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD
from apt_core.models.wan import WanBackbone
from trainer.mini import VAE

PACK = Path(__file__).parents[2]
MEAN, STD = (torch.tensor(values["2.1"]).view(-1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
NATIVE = {"width": 64, "height": 32, "frames": 5, "fps": 12.0}
Z = torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(1, 7, 20, generator=torch.Generator().manual_seed(1))


def tiny(seed: int, **config) -> WanBackbone:
    return tiny_wan_16(2, seed, **config).requires_grad_(False)


def another() -> WanBackbone:
    """Other weights but for the modulation, which ComfyUI leaves out when it patches: it patches modules that
    have no modules inside.
    """
    model, other = tiny(0), tiny(1)
    other.load_state_dict(
        {key: value for key, value in model.state_dict().items() if key.endswith("scale_shift_table")},
        strict=False,
    )
    return other


def write_good_files(folder: Path) -> None:
    model = tiny(0)
    apt = {"base": "test", "phase": "video", "native": NATIVE}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        save_generator(folder / f"{name}.safetensors", model, model.config, apt, dtype)
    save_generator(folder / "another.safetensors", another(), model.config, apt)
    save_generator(folder / "base.safetensors", model, model.config, {"kind": "base"})
    save_generator(folder / "distilled.safetensors", model, model.config, apt | {"phase": "distilled"})

    config = {"config": json.dumps({"transformer": comfy_config(model.config)})}
    official = {transformer_to_official(key): value.clone() for key, value in model.state_dict().items()}
    save_file(model.state_dict(), folder / "diffusers.safetensors", config)
    save_file(official, folder / "foreign.safetensors", config)
    save_file(
        {f"diffusion_model.{key}": value for key, value in official.items()},
        folder / "prefixed.safetensors",
        config,
    )
    apt = config | {"apt": json.dumps({"format": 1, "kind": "generator", "timestep": 1000})}
    linear = [
        key
        for key, value in official.items()
        if key.startswith("blocks.") and value.ndim == 2 and key.endswith(".weight")
    ]
    save_file(
        official | {key: official[key].to(torch.float8_e4m3fn) for key in linear},
        folder / "fp8.safetensors",
        apt,
    )
    scaled = dict(official, scaled_fp8=torch.zeros(2, dtype=torch.float8_e4m3fn))
    for key in linear:
        scale = official[key].abs().max() / 448
        scaled[key] = (official[key] / scale).to(torch.float8_e4m3fn)
        scaled[key.replace(".weight", ".scale_weight")] = scale
    save_file(scaled, folder / "scaled.safetensors", apt)


def write_bad_files(folder: Path) -> None:
    model = tiny(0)
    official = {transformer_to_official(key): value.clone() for key, value in model.state_dict().items()}
    config = {"config": json.dumps({"transformer": comfy_config(model.config)})}

    def apt(**fields) -> dict:
        return config | {"apt": json.dumps({"format": 1, "kind": "generator"} | fields)}

    whole = (folder / "fp32.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-100])
    (folder / "longer.safetensors").write_bytes(whole + bytes(100))
    torch.save(official, folder / "pickle.pt")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "vae.safetensors").write_bytes(VAE.read_bytes())
    lora = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 48)), ("B", (48, 2)))
    }
    save_file(lora, folder / "lora.safetensors")
    save_file(lora, folder / "apt lora.safetensors", apt(kind="lora"))
    save_file(
        {f"backbone.{key}": value for key, value in model.state_dict().items()},
        folder / "discriminator.safetensors",
    )
    save_file(
        {key: value for key, value in official.items() if key != "blocks.1.cross_attn.k.weight"},
        folder / "missing.safetensors",
        apt(),
    )
    save_file(official, folder / "no heads.safetensors")
    wide = tiny(0, num_attention_heads=1, attention_head_dim=128)
    save_file(
        {transformer_to_official(key): value for key, value in wide.state_dict().items()},
        folder / "no config.safetensors",
    )
    save_file(official, folder / "newer.safetensors", apt(format=2))
    save_file(official, folder / "kind.safetensors", apt(kind="critic"))
    save_file(official, folder / "native.safetensors", apt(native={"width": 64}))
    save_file(official, folder / "fps.safetensors", apt(native=NATIVE | {"fps": 0}))
    narrow = official | {"blocks.1.self_attn.q.weight": official["blocks.1.self_attn.q.weight"][:-2].clone()}
    save_file(narrow, folder / "shape.safetensors", apt())
    foreign = comfy_config(model.config) | {"attention_head_dim": 24}
    save_file(
        official, folder / "foreign config.safetensors", {"config": json.dumps({"transformer": foreign})}
    )


@pytest.fixture(scope="module")
def run(comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    files = folder / "files"
    write_good_files(files)
    write_bad_files(files)
    save_file({"text": TEXT}, folder / "in.safetensors")
    result = comfyui(
        "load_checkpoints",
        pack=PACK,
        files=files,
        inputs=folder / "in.safetensors",
        out=folder / "out.safetensors",
    )
    latents = {name: (value - MEAN) / STD for name, value in load_file(folder / "out.safetensors").items()}
    return files, latents, result


def test_weights_arrive_whole(run):
    files, latents, _ = run
    exact = one_step(tiny(0), Z, TEXT)
    for name in ("fp32", "base", "distilled", "foreign", "prefixed", "diffusers"):
        assert_close(latents[f"{name}.safetensors"], exact, rtol=0, atol=1e-5)
    for dtype in ("bf16", "fp16"):
        rounded = one_step(load_transformer(files / f"{dtype}.safetensors"), Z, TEXT)
        assert_close(latents[f"{dtype}.safetensors"], rounded, rtol=0, atol=1e-5)
        assert not torch.equal(rounded, exact)
    for name in ("bf16", "fp16"):
        model, dtype = tiny(0), {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        # ComfyUI keeps the patch embedding of Wan in fp32, whatever the rest.
        for weight in (
            weight for key, weight in model.named_parameters() if not key.startswith("patch_embedding")
        ):
            weight.copy_(weight.to(dtype))
        assert_close(latents[f"as {name}"], one_step(model, Z, TEXT), rtol=0, atol=1e-5)


def test_fp8_files_load(run):
    exact, _, latents = one_step(tiny(0), Z, TEXT), *run[:2]
    velocity = (Z - exact).norm()
    errors = {
        name: ((latents[name] - exact).norm() / velocity).item()
        for name in ("fp8.safetensors", "scaled.safetensors", "as fp8_e4m3fn")
    }
    # e4m3 has 3 bits of mantissa: a rounding of up to 1/16, 0.036 in the mean square, on some of the layers.
    assert all(1e-4 < error < 0.05 for error in errors.values()), errors


def test_models_can_be_merged(run):
    mix, other = tiny(0), another().state_dict()
    mix.load_state_dict({key: 0.25 * value + 0.75 * other[key] for key, value in mix.state_dict().items()})
    assert_close(run[1]["mix"], one_step(mix, Z, TEXT), rtol=0, atol=1e-5)


def test_a_clone_for_another_device_is_the_same_model(run):
    _, latents, result = run
    for clone in ("clone 0", "clone 1"):
        assert torch.equal(latents[clone], latents["fp32.safetensors"])
    apt = {
        "format": 1,
        "kind": "generator",
        "timestep": 1000,
        "base": "test",
        "phase": "video",
        "native": NATIVE,
    }
    assert result["attachments"] == [apt] * 3


def test_weights_are_held_as_the_file_has_them(run):
    result = run[2]
    held = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    assert result["held"] == {f"{name}.safetensors": f"torch.{dtype}" for name, dtype in held.items()}
    assert result["chosen"] == {
        "bf16": "torch.bfloat16",
        "fp16": "torch.float16",
        "fp8_e4m3fn": "torch.float8_e4m3fn",
    }
    assert result["stock"] == "torch.float16", (
        "ComfyUI has come to follow the file: then ours need not choose"
    )


def test_a_model_without_adversarial_training_gets_a_warning(run):
    shown, logged = run[2]["shown"], run[2]["logged"]
    end = "one step of such a model is blurred. Choose an APT checkpoint, or add the APT LoRA of this model."
    foreign = [f"{name}.safetensors" for name in ("foreign", "prefixed", "diffusers")]
    expected = {name: f"{name} has no metadata that tells of adversarial training: {end}" for name in foreign}
    expected["base.safetensors"] = f"base.safetensors is a base model, not adversarially trained: {end}"
    expected["distilled.safetensors"] = (
        f"distilled.safetensors was distilled but not adversarially trained: {end}"
    )
    assert {name: text for name, text in shown.items() if text} == {
        name: [text, [text, "APTLoadCheckpoint"]] for name, text in expected.items()
    }
    assert {name: lines for name, lines in logged.items() if lines} == {
        name: [f"Load APT Checkpoint: {text}"] for name, text in expected.items()
    }
    assert {"fp32.safetensors", "fp8.safetensors", "scaled.safetensors"} < shown.keys()


def test_the_miniature_is_in_the_list(run):
    listed = run[2]["listed"]
    assert listed["default"] == "apt_mini.safetensors"
    assert listed["options"] == sorted(["apt_mini.safetensors", *(file.name for file in run[0].iterdir())])


def test_bad_files_get_a_sentence(run):
    result = run[2]
    name = "AptError Load APT Checkpoint:"
    size = (run[0] / "fp32.safetensors").stat().st_size
    again = "copy or download it again."
    assert result["sentences"] == {
        "truncated.safetensors": (
            f"{name} truncated.safetensors is truncated ({size - 100} bytes of {size}): {again}"
        ),
        "longer.safetensors": (
            f"{name} longer.safetensors has 100 bytes too many after its last tensor: {again}"
        ),
        "pickle.pt": (
            f"{name} pickle.pt is a pickle (.pt, .pth, .ckpt), which can run code when it is opened: "
            "convert it to safetensors."
        ),
        "pointer.safetensors": (
            f"{name} pointer.safetensors is a git-lfs pointer, not the file itself: run `git lfs pull`."
        ),
        "vae.safetensors": (
            f"{name} vae.safetensors: it is not a Wan transformer (conv1.bias is its first key, "
            "and head.modulation is not there): give a Wan model's file."
        ),
        "lora.safetensors": (
            f"{name} lora.safetensors is a LoRA, not a whole model: load the model that it belongs to, "
            "and the LoRA with Load LoRA (Model Only)."
        ),
        "apt lora.safetensors": (
            f"{name} apt lora.safetensors is a LoRA, not a whole model: load the model that it belongs to, "
            "and the LoRA with Load LoRA (Model Only)."
        ),
        "discriminator.safetensors": (
            f"{name} discriminator.safetensors: it is not a Wan transformer "
            "(backbone.blocks.0.attn1.norm_k.weight is its first key, and head.modulation is not there): "
            "give a Wan model's file."
        ),
        "missing.safetensors": (
            f"{name} missing.safetensors: blocks.1.cross_attn.k.weight missing: "
            "the file is not a whole Wan transformer, export or download it again."
        ),
        "no heads.safetensors": (
            f"{name} no heads.safetensors: the number of heads cannot be told from 48 channels: "
            "name a fitting num_heads in its metadata entry `config`."
        ),
        "no config.safetensors": (
            f"{name} no config.safetensors: its text_dim is 20, but its metadata entry `config` does not say "
            "so and ComfyUI takes 4096: use the file that the trainer wrote, "
            "or save the model with Save APT Checkpoint, which keeps the metadata."
        ),
        "newer.safetensors": (
            f"{name} newer.safetensors has format 2 of the checkpoint contract, "
            "but this version only reads up to 1: update ComfyUI-APT."
        ),
        "kind.safetensors": (
            f"{name} kind.safetensors: its metadata entry `apt` has kind 'critic': "
            "it must be one of generator, base, lora."
        ),
        "native.safetensors": (
            f"{name} native.safetensors: its metadata entry `apt` has native {{'width': "
            "64}, not width, height, frames and fps: export the file again."
        ),
        "fps.safetensors": (
            f"{name} fps.safetensors: its metadata entry `apt` has native {NATIVE | {'fps': 0}}, not width, "
            "height, frames and fps: export the file again."
        ),
        "shape.safetensors": (
            f"{name} shape.safetensors: ComfyUI cannot build its transformer (Error(s) in loading state_dict "
            "for WanModel: size mismatch for blocks.1.self_attn.q.weight: "
            "copying a param with shape torch.Size([46, 48]) from checkpoint, "
            "the shape in current model is torch.Size([48, 48]).): export or download it again."
        ),
        "foreign config.safetensors": (
            f"{name} foreign config.safetensors: ComfyUI cannot build its transformer (WanModel.__init__() "
            "got an unexpected keyword argument 'attention_head_dim'): export or download it again."
        ),
    }
    places = "models/diffusion_models or models/apt"
    assert (
        result["not there"]
        == f"{name} nowhere.safetensors is not in {places}: put the file there, or choose another one."
    )
