"""`inspect` says of every form of weights what it is, and whether it loads here, for what and with which
parts.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from apt_core.engine.text_cache import TextCache
from apt_core.errors import AptError
from apt_core.files.tensorfile import write_tensors
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.sources import SHIPPED, read_sources
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.tiny_decoder import TinyDecoder
from apt_core.models.vae import load_vae
from trainer.checkpoints.inspect import inspect
from trainer.data.prompts import write_prompts
from trainer.data.shards import INDEX
from trainer.evaluate.compare import RESULT as EVALUATION
from trainer.evaluate.measured import Record
from trainer.mini import ASSETS
from trainer.run.folders import ABOUT, DIFFERENCES, FACTS, STATE
from trainer.run.monitor import Monitor

NEEDS = "needs a vae of 16 channels (Wan 2.1) and a text_encoder of width 96"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline of the miniature: transformer, vae, text_encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("pipeline")
    WanTransformer3DModel.save_pretrained(load_transformer(SHIPPED["base"]), folder / "transformer")
    AutoencoderKLWan.save_pretrained(load_vae(SHIPPED["vae"]), folder / "vae")
    encoder = load_text_encoder(SHIPPED["text_encoder"])
    UMT5EncoderModel.save_pretrained(encoder.model, folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    spiece = bytes(load_file(SHIPPED["text_encoder"])["spiece_model"].tolist())
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece)
    return folder


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_pipeline_and_each_of_its_parts(deep, pipeline):
    facts = inspect(pipeline, deep)
    vae, text = "yes, as the vae of Wan 2.1 models", "yes, as text_encoder of width 96"
    wan = f"yes, as checkpoint, in Euler steps, or as base; {NEEDS}"
    assert (facts["loads"], facts["vae loads"], facts["text loads"]) == (wan, vae, text)
    assert inspect(pipeline / "transformer", deep)["loads"] == wan
    assert inspect(pipeline / "vae", deep) == {"what": "folder of a Wan VAE", "loads": vae}
    spiece = str(pipeline / "tokenizer" / "spiece.model")
    found = {"what": "folder of a text encoder", "tokenizer": spiece, "loads": text}
    assert inspect(pipeline / "text_encoder", deep) == found
    assert read_sources(pipeline, pipeline, pipeline).text.facts.width == 96  # as it said


def test_folders_that_do_not_load(pipeline, tmp_path):
    for part, key in (("vae", "decoder.conv_in.bias"), ("text_encoder", "encoder.final_layer_norm.weight")):
        shutil.copytree(pipeline / part, tmp_path / part)
        (file,) = (tmp_path / part).glob("*.safetensors")
        save_file({name: value for name, value in load_file(file).items() if name != key}, file)
        loads = inspect(tmp_path / part)["loads"]
        assert loads.startswith("no: ") and f"{key} missing" in loads
    shutil.rmtree(tmp_path / "text_encoder")
    shutil.copytree(pipeline / "text_encoder", tmp_path / "text_encoder")
    facts = inspect(tmp_path / "text_encoder")
    assert facts["loads"] == "yes, as text_encoder of width 96; needs tokenizer=PATH"


def test_the_shipped_files(tmp_path):
    assert inspect(SHIPPED["checkpoint"])["loads"] == f"yes, as checkpoint, in one step; {NEEDS}"
    base = f"yes, as checkpoint, in Euler steps, or as base; {NEEDS}"
    assert inspect(SHIPPED["base"])["loads"] == base
    assert inspect(SHIPPED["vae"])["loads"] == "yes, as the vae of Wan 2.1 models"
    text = inspect(SHIPPED["text_encoder"])
    assert (text["what"], text["tokenizer"], text["loads"]) == (
        "UMT5 text encoder",
        "inside",
        "yes, as text_encoder of width 96",
    )


@pytest.mark.parametrize("channels, version", [(16, "2.1"), (48, "2.2")])
def test_tiny_decoders(channels, version, tmp_path):
    save_file(TinyDecoder(channels).state_dict(), tmp_path / "tae.safetensors")
    facts = inspect(tmp_path / "tae.safetensors", deep=True)
    assert facts["what"] == "tiny decoder"
    use = f"as tiny_decoder, which is approximate, of Wan {version} models' latents"
    assert facts["loads"] == f"yes, {use}"


def test_numbers_that_are_none_are_found_by_deep_alone(tmp_path):
    tensors = load_file(SHIPPED["vae"])
    tensors["decoder.conv1.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "vae.safetensors")
    assert inspect(tmp_path / "vae.safetensors")["loads"].startswith("yes")
    assert "decoder.conv1.bias holds NaN" in inspect(tmp_path / "vae.safetensors", deep=True)["loads"]


def test_a_model_for_images_beside_the_noise_is_no_checkpoint(tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=10,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    save_generator(tmp_path / "i2v.safetensors", model, model.config, {"kind": "base"})
    assert "takes 36 channels and makes 16" in inspect(tmp_path / "i2v.safetensors")["loads"]


def test_every_file_that_is_shipped_or_left_by_a_run_has_a_name(tmp_path):
    """Each as the code itself writes it."""
    text = SimpleNamespace(text_length=32, dim=4, encode=lambda prompts: [torch.ones(3, 4)] * len(prompts))
    write_prompts(tmp_path, text, ["a red circle", "bad quality"])
    TextCache(tmp_path / "cache", "encoder").get(["a red circle"], text.encode)
    Record({"motion": 0.5}, {"fid": np.zeros((1, 2))}, None).write(tmp_path / "000001.npz")
    write_tensors(tmp_path / DIFFERENCES, {"blocks.0.norm3.diff": torch.ones(4)}, {})
    for name in (ABOUT, FACTS, INDEX, EVALUATION):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    Monitor(tmp_path)(1, 1, {"loss": 1.0})
    (kept,) = (tmp_path / "cache").iterdir()
    files = [path for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith("events.")]
    found = {path.name: inspect(path) for path in files} | {"kept": inspect(kept)}
    assert {name: facts["what"] for name, facts in found.items()} == {
        "prompts.safetensors": "embeddings of prompts",
        "kept": "embedding of one prompt, kept for the next time",
        "000001.npz": "what an evaluation has measured on one clip",
        "differences.safetensors": "what a LoRA's start changes beside adapters",
        "about.json": "says what the training states beside it were trained from",
        "run.json": "facts of the training state that its folder is",
        "index.json": "index of the shards that its folder holds",
        "evaluation.json": "figures of an evaluation",
        "history.csv": "log of a stage, which `plot` draws",
    }
    assert found["prompts.safetensors"]["prompts"] == "a red circle\nbad quality"
    assert found["000001.npz"]["figures"] == "motion  0.5" and "as a start" not in found[DIFFERENCES]
    assert inspect(tmp_path / "prompts.safetensors", deep=True)["loads"] == "yes"
    write_prompts(tmp_path, text, [])
    assert inspect(tmp_path / "prompts.safetensors")["what"] == "embeddings of prompts"
    shipped = [path for path in ASSETS.rglob("*.safetensors") if "unknown" in inspect(path)["what"]]
    assert shipped == [] and "judge" in inspect(ASSETS / "features.safetensors")["what"]


def test_a_file_of_another_program_is_not_taken_for_one_of_ours(tmp_path):
    for metadata in ({"about": "a model"}, {"about": '{"prompts": ["x"]}'}, {"about": '{"prompts": 3}'}, {}):
        save_file({"0": torch.ones(2), "1": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
        assert inspect(tmp_path / "x.safetensors")["what"] == "unknown (0 is its first key)"
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for name in ("x.npz", "other.json"):
        with pytest.raises(AptError):
            inspect(tmp_path / name)


def test_folders_of_a_run_without_a_result_and_of_an_evaluation(tmp_path):
    (tmp_path / "run" / "latents").mkdir(parents=True)
    (tmp_path / "run" / "latents" / INDEX).touch()
    what = {"what": "folder of a run that has finished no stage", "latents": f"{tmp_path}/run/latents"}
    assert inspect(tmp_path / "run") == what
    state = tmp_path / "run" / "states" / "distill" / "step-000020"
    state.mkdir(parents=True), (state / FACTS).touch(), (state / STATE).touch()
    on = {"distill goes on": f"from {state}"}
    assert inspect(tmp_path / "run") == what | on
    assert inspect(tmp_path / "run" / "states") == {"what": "training states of a run"} | on
    (tmp_path / "page").mkdir()
    with pytest.raises(AptError, match="is not a folder of a Wan transformer"):
        inspect(tmp_path / "page")
    (tmp_path / "page" / EVALUATION).touch()
    assert inspect(tmp_path / "page")["what"] == "folder of an evaluation"
