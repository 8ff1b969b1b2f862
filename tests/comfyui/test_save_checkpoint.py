"""Save APT Checkpoint in a real ComfyUI: the model in memory, bit for bit, for ComfyUI and the trainer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_nodes_loader import MEAN, NATIVE, PACK, STD, TEXT, Z, tiny, write_good_files
from torch.testing import assert_close

from apt_core.files.checkpoint_header import read_header, read_metadata
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.method.generator import one_step
from trainer.checkpoints.inspect import inspect

EXACT = (
    "plain bf16",
    "lora",
    "lora bf16",
    "merge",
    "merge fp16 and lora",
    "base and apt lora",
    "nameless base and apt lora",
    "stock",
    "fp8",
    "scaled",
)
APT = {"format": 1, "kind": "generator", "timestep": 1000, "base": "test", "phase": "video", "native": NATIVE}
OF_LORA = {
    "format": 1,
    "kind": "lora",
    "rank": 3,
    "timestep": 1000,
    "base": "wan",
    "phase": "image",
    "second_time": 0.6,
    "native": NATIVE | {"fps": 8.0},
}


def write_files(folder: Path) -> None:
    write_good_files(folder)
    (folder / "foreign.safetensors").rename(folder / "nameless.safetensors")
    other = tiny(1)
    save_generator(folder / "another.safetensors", other, other.config, {"base": "another"})
    large = tiny(0)
    large.patch_embedding.weight.mul_(1e6)
    save_generator(folder / "large.safetensors", large, large.config, APT)
    torch.manual_seed(2)
    pairs = {}
    for layer, (wide, tall) in {
        "blocks.0.self_attn.q": (48, 48),
        "blocks.1.ffn.0": (48, 80),
        "text_embedding.0": (20, 48),
        "head.head": (48, 64),
    }.items():
        pairs[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(3, wide)
        pairs[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(tall, 3) / 10
    save_file(pairs, folder / "style.safetensors")
    save_file(pairs, folder / "apt lora.safetensors", {"apt": json.dumps(OF_LORA)})


@pytest.fixture(scope="module")
def run(comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("save")
    write_files(folder / "files")
    (folder / "saved").mkdir()
    (folder / "saved" / "blocked").write_text("a file in the place of a folder")
    save_file({"text": TEXT}, folder / "in.safetensors")
    result = comfyui(
        "save_checkpoints",
        pack=PACK,
        files=folder / "files",
        saved=folder / "saved",
        inputs=folder / "in.safetensors",
        out=folder / "out.safetensors",
    )
    return folder / "saved" / "diffusion_models", load_file(folder / "out.safetensors"), result


def file(saved: Path, name: str) -> Path:
    return saved / f"{name}_00001_.safetensors"


@pytest.mark.parametrize("name", EXACT)
def test_a_saved_model_gives_the_latents_of_the_one_in_memory(run, name):
    saved, latents, _ = run
    assert torch.equal(latents[f"{name}, saved"], latents[f"{name}, in memory"])
    assert torch.equal(latents[f"{name}, again in memory"], latents[f"{name}, in memory"]), (
        "saving has changed the model"
    )
    assert file(saved, f"{name} unused").read_bytes() == file(saved, name).read_bytes(), (
        "it depends on whether the model was used before"
    )


def test_patches_are_in_the_file(run):
    _, latents, _ = run
    for name in ("lora", "merge", "stock"):
        assert (latents[f"{name}, saved"] - latents["plain bf16, saved"]).abs().mean() > 0.05


@pytest.mark.parametrize("name", ("plain bf16", "lora", "merge", "base and apt lora", "stock", "as fp32"))
def test_the_trainer_reads_what_was_saved(run, name):
    saved, latents, _ = run
    ours = one_step(load_transformer(file(saved, name)), Z, TEXT)
    theirs = (latents[f"{'lora' if name == 'as fp32' else name}, saved"] - MEAN) / STD
    assert_close(theirs, ours, rtol=0, atol=1e-5)
    facts = inspect(file(saved, name), deep=True)
    assert facts["loads"].startswith("yes, as checkpoint, in one step; needs a vae of 16 channels")
    assert (facts["kind"], facts["ComfyUI reads"]) == (
        "generator",
        "its settings from the metadata entry config",
    )


def test_the_metadata_is_kept(run):
    saved = run[0]
    assert read_metadata(file(saved, "plain bf16")) == APT
    for name in ("lora", "merge", "merge fp16 and lora", "stock", "as bf16"):
        assert read_metadata(file(saved, name)) == APT | {"edited": "ComfyUI"}, name
    assert run[2]["attached"] == APT, "the MODEL itself says what its file said"
    of_lora = {key: value for key, value in OF_LORA.items() if key != "rank"} | {
        "kind": "generator",
        "edited": "ComfyUI",
    }
    assert read_metadata(file(saved, "base and apt lora")) == of_lora
    assert read_metadata(file(saved, "nameless base and apt lora")) == of_lora


def test_the_graph_is_in_the_file_as_stock_nodes_have_it(run):
    metadata = read_header(run[0] / "lora_00002_.safetensors").metadata
    assert json.loads(metadata["prompt"]) == {"1": "a node"} and json.loads(metadata["workflow"]) == {
        "nodes": []
    }
    assert json.loads(metadata["apt"]) == APT | {"edited": "ComfyUI"}, "nothing of a graph may take its place"


def test_dtypes(run):
    saved, latents, _ = run
    official = read_header(file(saved, "lora")).shapes
    for name, stored in {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}.items():
        for which in (f"as {name}", f"scaled as {name}"):
            header = read_header(file(saved, which))
            assert set(header.dtypes.values()) == {stored} and header.shapes == official, which
        # The layers are computed in 16 bits and with rounded inputs where they are quantised.
        exact, found = (latents[f"scaled{end}"] for end in (", in memory", f" as {name}, saved"))
        assert (found - exact).norm() / exact.norm() < 0.02
    assert "F8_E4M3" in read_header(file(saved, "scaled")).dtypes.values()


def test_what_it_says(run):
    result = run[2]
    assert (
        result["said"] == "Saved diffusion_models/lora_00002_.safetensors"
        and result["shown"] == [result["said"], "7"]
        and result["outputs"] == []
    )
    where = "which the loaders do not list: begin the prefix with diffusion_models/, "
    where += "or move the file to models/diffusion_models."
    assert result["elsewhere"] == f"Saved elsewhere/lora_00001_.safetensors, {where}"
    name = "AptError Save APT Checkpoint:"
    unknown = (
        f"{name} the model's file has no `apt` metadata, so nothing tells how it was trained: "
        "save it with stock Save Model, or start from "
        "a checkpoint or a LoRA that the trainer exported."
    )
    assert result["no metadata"] == result["no metadata, our loader"] == unknown
    assert result["bypass"] == (
        f"{name} the model has a bypass LoRA, which a file of weights cannot hold: "
        "add the LoRA with Load LoRA (Model Only) instead."
    )
    for given, what in {
        "../x": "leads out of ComfyUI's output folder",
        "diffusion_models/": "contains no file name",
        "": "contains no file name",
    }.items():
        key = {"../x": "outside", "diffusion_models/": "no name", "": "empty"}[given]
        assert (
            result[key]
            == f'{name} filename_prefix is "{given}", which {what}: give one such as diffusion_models/apt.'
        )
    saved = run[0].parent
    large = saved / "diffusion_models" / "x_00001_.safetensors"
    assert (
        result["too large for fp16"]
        == f"{name} {large}: patch_embedding.weight has weights beyond what fp16 can hold: use bf16 or fp32."
    )
    assert result["blocked"].startswith(f"{name} {saved / 'blocked'} cannot be made (") and result[
        "blocked"
    ].endswith("--output-directory.")


def test_nothing_half_written_is_left(run):
    assert all(path.suffix == ".safetensors" for path in run[0].iterdir())
    assert not list(run[0].glob("x_*"))
