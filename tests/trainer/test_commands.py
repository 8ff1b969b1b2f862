"""Every command on the miniature: the files it leaves, and its mistakes as one sentence before the first
step.
"""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from commands import command, done, refused
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_header, read_metadata
from apt_core.files.tensorfile import read_tensors, write_tensors
from apt_core.loading.backbones import load_backbone
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.method.flow import sample_noise
from apt_core.method.generator import one_step
from apt_core.models.lora import merged_state
from apt_core.models.mmdit import MMDiTBackbone
from apt_core.models.tiny_decoder import TinyDecoder
from trainer.checkpoints.export import FP8
from trainer.checkpoints.generate import find_source
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.trained_models import State, open_discriminator, open_generator
from trainer.data import shards
from trainer.data.prompts import Prompts
from trainer.mini import ASSETS, GENERATOR
from trainer.run.folders import resolve

TINY = str(Path(__file__).parent / "tiny.toml")
TINY_MMDIT = str(Path(__file__).parent / "tiny_mmdit.toml")
STATES = ["save_every=1", "sample_every=2", "ema_decays=[0.5]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages in the smallest form; the video phase as a LoRA in a folder of its own."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    assert "8 images, 8 videos" in done("precompute", TINY, "--out", out)
    done("distill", TINY, *STATES, "--out", out)
    done("adversarial", TINY, "--phase", "image", *STATES, "--out", out)
    done("adversarial", TINY, "--phase", "video", "updates=1", "--out", out)
    done(
        "adversarial",
        TINY,
        "--phase",
        "video",
        "mode=lora",
        "lora_rank=3",
        "save_every=1",
        "--shards",
        out / "latents",
        "--out",
        out / "lora",
    )
    return out


def test_the_stages_leave_their_files(run):
    for name, phase, updates in (
        ("distilled", "distilled", 3),
        ("apt-image", "image", 2),
        ("apt-tiny", "video", 1),
    ):
        apt = json.loads(read_header(run / f"{name}.safetensors").metadata["apt"])
        assert (apt["kind"], apt["phase"], apt["updates"], apt["base"], apt["timestep"]) == (
            "generator",
            phase,
            updates,
            "mini",
            1000,
        )
        assert apt["native"] == {"height": 48, "width": 48, "frames": 1 if phase == "image" else 9, "fps": 8}
        assert apt["second_time"] == 0.6
    image, video = (
        load_transformer(run / f"{name}.safetensors").state_dict() for name in ("apt-image", "apt-tiny")
    )
    distilled = load_transformer(run / "distilled.safetensors").state_dict()
    key = "blocks.0.attn1.to_q.weight"
    assert (
        0 < (image[key] - distilled[key]).abs().max() < 1e-3
        and 0 < (video[key] - image[key]).abs().max() < 1e-3
    )
    assert (
        read_header(run / "apt-image-ema0.5.safetensors").shapes
        == read_header(run / "apt-image.safetensors").shapes
    )
    assert {path.suffix for path in (run / "samples" / "image").iterdir()} == {".png"}
    assert (
        read_metadata(run / "apt-image-ema0.5.safetensors")["second_time"]
        == read_metadata(run / "lora" / "apt-tiny.safetensors")["second_time"]
        == 0.6
    )
    lora = read_header(run / "lora" / "apt-tiny.safetensors")
    assert json.loads(lora.metadata["apt"])["kind"] == "lora" and lora.shapes[
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    ] == (3, 128)


def test_a_state_is_what_the_run_wrote(run):
    states = run / "states" / "image"
    last, result = (
        open_generator(states).model.state_dict(),
        load_transformer(run / "apt-image.safetensors").state_dict(),
    )
    assert last.keys() == result.keys() and all(
        torch.equal(value, result[key]) for key, value in last.items()
    )
    other = open_generator(states / "step-000002", ema=0.5).model.state_dict()
    beside = load_transformer(run / "apt-image-ema0.5.safetensors").state_dict()
    assert all(torch.equal(other[key], beside[key]) for key in beside)
    raw = open_generator(states, ema=0).model.state_dict()
    assert not torch.equal(raw["proj_out.weight"], other["proj_out.weight"])
    assert "has no average of decay 0.7: it has 0.5, 0.9, and 0 for the raw weights." in refused(
        "export", states, "--out", run / "x", "--ema", "0.7"
    )


def test_states_are_judged_and_the_best_is_told(run):
    rows = [
        json.loads((path / "run.json").read_text(encoding="utf-8"))
        for path in sorted((run / "states" / "image").glob("step-*"))
    ]
    assert [row["score"] > 0 for row in rows] == [True, True] and rows[-1]["rows"][0]["judged"] == rows[0][
        "score"
    ]
    shown = " ".join(done("adversarial", TINY, "--phase", "image", *STATES, "--out", run).split())
    first, last = (row["score"] for row in rows)
    better = (
        f"is the result; an earlier state was judged better ({first:.3g}): "
        f"to have that one, export {run}/states/image/step-000001."
    )
    assert (better if first < last else f"is the result, and the best that was judged ({last:.3g}).") in shown
    assert inspect(run / "states" / "image")["judged"].startswith(f"{rows[-1]['score']:.4g}")


def test_export_in_every_form(run, tmp_path):
    z, text = torch.randn(1, 16, 3, 6, 6), torch.randn(1, 32, 96)
    source = run / "apt-tiny.safetensors"
    with torch.no_grad():
        wanted = one_step(load_transformer(source), z, text)
        for dtype, error in (("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)):
            done("export", run, "--out", tmp_path / f"{dtype}.safetensors", "--dtype", dtype)
            made = one_step(load_transformer(tmp_path / f"{dtype}.safetensors"), z, text)
            assert (made - wanted).norm() / wanted.norm() < error
        done("export", source, "--out", tmp_path / "folder", "--form", "diffusers", "--dtype", "fp32")
        torch.testing.assert_close(one_step(load_transformer(tmp_path / "folder"), z, text), wanted)
    assert "was trained whole, not as a LoRA" in refused(
        "export", source, "--out", tmp_path / "l", "--form", "lora"
    )


def test_fp8_has_a_scale_for_every_linear_layer_of_the_blocks(run, tmp_path):
    done("export", run / "apt-tiny.safetensors", "--out", tmp_path / "8.safetensors", "--dtype", "fp8")
    packed, header = read_tensors(tmp_path / "8.safetensors", floats_only=False)
    exact, _ = read_tensors(run / "apt-tiny.safetensors")
    eight = {key for key, value in packed.items() if value.dtype == FP8 and key != "scaled_fp8"}
    assert eight == {
        key
        for key, value in exact.items()
        if key.startswith("blocks.") and key.endswith("weight") and value.ndim == 2
    }
    for key in eight:
        back = packed[key].float() * packed[key.replace("weight", "scale_weight")]
        assert (back - exact[key]).norm() / exact[key].norm() < 0.04
    assert (
        packed["head.head.weight"].dtype == torch.bfloat16
        and json.loads(header.metadata["config"])["transformer"]["num_heads"] == 4
    )


def test_a_lora_is_exported_alone_and_merged(run, tmp_path, monkeypatch):
    lora, base = run / "lora" / "apt-tiny.safetensors", ASSETS / "transformer.safetensors"
    assert "is a LoRA: add --base PATH" in refused("export", lora, "--out", tmp_path / "x")
    done("export", lora, "--out", tmp_path / "whole.safetensors", "--base", "mini", "--dtype", "fp32")
    said = done(
        "export",
        run / "lora" / "states" / "video",
        "--out",
        tmp_path / "lora.safetensors",
        "--form",
        "lora",
        "--dtype",
        "fp32",
    )
    assert said.strip().endswith(", over transformer.safetensors")
    over = read_metadata(tmp_path / "lora.safetensors")["over"], read_metadata(lora)["over"]
    assert over == (base.name, base.name)
    assert not read_metadata(tmp_path / "whole.safetensors").keys() & {"over", "rank"}
    again, trained = read_tensors(tmp_path / "lora.safetensors")[0], read_tensors(lora)[0]
    assert all(torch.equal(again[key], trained[key]) for key in trained)
    whole, opened, plain = (
        load_transformer(tmp_path / "whole.safetensors"),
        open_generator(lora, base),
        load_transformer(base),
    )
    stock = WanTransformer3DModel.from_config(plain.config)
    stock.load_state_dict(plain.state_dict())
    WanPipeline(None, None, None, None, transformer=stock).load_lora_weights(
        tmp_path, weight_name="lora.safetensors"
    )
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    g = torch.Generator().manual_seed(0)
    z, text = torch.randn(1, 16, 1, 6, 6, generator=g).double(), torch.randn(1, 32, 96, generator=g).double()
    with torch.no_grad():
        opened.base.double()  # and the role upon it
        merged, adapted, base_alone = (
            one_step(model, z, text) for model in (whole.double(), opened.model, plain.double())
        )
        # The merged file's weights are rounded to fp32: moving each of the base's by as much moves its output
        # by 1.2e-6.
        torch.testing.assert_close(merged, adapted, rtol=0, atol=3e-6)
        assert (adapted - base_alone).abs().max() > 50 * 3e-6  # the average of two updates
        v = stock.double()(
            hidden_states=z,
            timestep=torch.tensor([1000.0]).double(),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        torch.testing.assert_close(z - v, adapted, rtol=0, atol=1e-10)


def test_the_mmdit_goes_the_whole_way(run, tmp_path):
    common = (TINY_MMDIT, "--shards", run / "latents", "--out", tmp_path)
    done("distill", *common)
    done("adversarial", *common, "--phase", "image")
    done("adversarial", *common, "--phase", "video", "save_every=1")
    start, image, video = (
        load_backbone(tmp_path / f"{name}.safetensors") for name in ("base", "apt-image", "apt-tiny-mmdit")
    )
    assert isinstance(video, MMDiTBackbone) and video.config.num_layers == 4
    for before, after in ((start, image), (image, video)):
        assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    facts = inspect(tmp_path / "apt-tiny-mmdit.safetensors")
    assert facts["what"] == "MMDiT of this trainer" and facts["phase"] == "video"
    done(
        "generate",
        tmp_path,
        "a red circle",
        "--vae",
        "mini",
        "--text-encoder",
        "mini",
        "--out",
        tmp_path / "clips",
    )
    (clip,) = (tmp_path / "clips").glob("0000-a-red-circle-seed0-*.mp4")
    with av.open(clip) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    raw = open_generator(tmp_path / "states" / "video", ema=0).model.state_dict()
    assert any(not torch.equal(raw[key], value) for key, value in video.state_dict().items())
    assert "is an MMDiT, which neither ComfyUI nor diffusers know" in refused(
        "export", tmp_path, "--out", tmp_path / "x.safetensors"
    )
    done(
        "adversarial",
        TINY_MMDIT,
        "--phase",
        "video",
        "mode=lora",
        "lora_rank=3",
        "save_every=0",
        "--shards",
        run / "latents",
        "--start",
        tmp_path / "base.safetensors",
        f"base={tmp_path / 'base.safetensors'}",
        "--out",
        tmp_path / "lora",
    )
    adapted = open_generator(tmp_path / "lora", tmp_path / "base.safetensors")
    assert (
        max(value.abs().max() for key, value in adapted.model.state_dict().items() if "lora_B" in key) > 1e-5
    )
    z, text = torch.randn(1, 16, 1, 6, 6), torch.randn(1, 32, 96)
    with torch.no_grad():
        assert not torch.equal(one_step(adapted.model, z, text), one_step(start, z, text))
    assert "an MMDiT, but preset tiny is for another kind of model" in refused(
        "distill", TINY, f"base={tmp_path / 'base.safetensors'}", "--out", tmp_path / "x"
    )


def test_generate_writes_what_the_checkpoint_is_for(run, tmp_path):
    files = ["--vae", "mini", "--text-encoder", "mini"]
    (tmp_path / "p.txt").write_text("a red circle\n\na blue square moving left\n")
    done("generate", run, "--prompts", tmp_path / "p.txt", "--count", 2, "--out", tmp_path / "v", *files)
    words = [
        "0000-a-red-circle-seed0",
        "0001-a-red-circle-seed0",
        "0002-a-blue-square-moving-left-seed0",
        "0003-a-blue-square-moving-left-seed0",
    ]
    names = sorted(path.name for path in (tmp_path / "v").iterdir())
    assert [name.rpartition("-")[0] for name in names] == words and all(
        name.endswith(".mp4") for name in names
    )
    with av.open(tmp_path / "v" / names[0]) as container:
        stream = container.streams.video[0]
        assert (
            stream.width,
            stream.height,
            float(stream.average_rate),
            sum(1 for _ in container.decode(stream)),
        ) == (48, 48, 8.0, 9)
    done(
        "generate",
        run / "apt-image.safetensors",
        "a red circle",
        "--steps",
        2,
        "--out",
        tmp_path / "i",
        *files,
    )
    (picture,) = (tmp_path / "i").glob("0000-a-red-circle-seed0-*.png")
    with Image.open(picture) as image:
        assert image.size == (48, 48)
    done(
        "generate",
        run / "lora" / "apt-tiny.safetensors",
        "x",
        "--frames",
        1,
        "--base",
        "mini",
        "--out",
        tmp_path / "l",
    )
    assert len(list((tmp_path / "l").iterdir())) == 1


def test_of_a_run_without_a_video_phase_it_is_said_that_images_are_made(run, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("distilled.safetensors", "apt-image.safetensors"):
        shutil.copyfile(run / name, half / name)
    note = f"{half} has finished no video phase, which makes clips: apt-image.safetensors is taken"
    ask = ("generate", half, "x", "--out", tmp_path / "samples")
    assert done(*ask).startswith(note) and note not in done(*ask, "--frames", 1)
    assert {path.suffix for path in (tmp_path / "samples").iterdir()} == {".png"}
    assert note in done("export", half, "--out", tmp_path / "x")
    assert note not in done("export", half / "apt-image.safetensors", "--out", tmp_path / "y")
    assert "has finished" not in done("export", run, "--out", tmp_path / "z")
    assert note in done("evaluate", half, "--prompts", _prompts(tmp_path), "--out", tmp_path / "e")
    walk = ("walk", half, "x", "--frames", 2, "--out", tmp_path / "w")
    assert done(*walk).startswith(note) and note not in done(*walk, "--length", 1)
    found = inspect(half)
    assert found["found"] == str(half / "apt-image.safetensors") and found["phase"] == "image"
    assert inspect(run)["found"] == str(run / "apt-tiny.safetensors")
    assert inspect(run / "states" / "image")["found"] == str(run / "states" / "image" / "step-000002")
    assert "found" not in inspect(run / "apt-image.safetensors")


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a red circle\n")
    return folder / "prompts.txt"


def test_generate_replaces_nothing_and_goes_on(run, tmp_path, monkeypatch):
    """Another seed, size or number of steps is another file; what is there is not made again, so that a
    stopped command goes on.
    """
    out, common = (
        tmp_path / "out",
        (
            "generate",
            run,
            "a red circle",
            "--count",
            2,
            "--vae",
            "mini",
            "--text-encoder",
            "mini",
            "--out",
            tmp_path / "out",
        ),
    )
    done(*common)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (("--seed", 1), ("--steps", 2), ("--frames", 5), ("--fps", 4), ("--noise", "comfyui")):
        done(*common, *other)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(after) == 12 and all(after[name] == value for name, value in first.items())
    lost = sorted(first)[1]
    (out / lost).unlink()
    made = []
    monkeypatch.setattr(
        OneStepPipeline,
        "write_sample",
        lambda self, request, number, text, path: made.append(Path(path).name),
    )
    done(*common)
    assert made == [lost]


def test_a_base_that_has_moved(run, tmp_path):
    """A state knows where its base was; --base says where it is, and without that the sentence says what was
    looked for.
    """
    states = tmp_path / "states" / "image"
    shutil.copytree(max((run / "states" / "image").glob("step-*")), states / "step-000001")
    about = json.loads((run / "states" / "image" / "about.json").read_text(encoding="utf-8"))
    base, gone = about["base"], str(tmp_path / "old" / "base.safetensors")
    (states / "about.json").write_text(json.dumps(about | {"base": gone}), encoding="utf-8")
    said = refused("export", states, "--out", tmp_path / "out.safetensors")
    assert f"was trained from {gone}, which is not there any more: add --base PATH" in said
    done("export", states, "--base", base, "--out", tmp_path / "out.safetensors")
    with pytest.raises(AptError, match="which is not there any more: add --base PATH"):
        find_source(states)
    assert find_source(states, base).config["num_layers"] == 6


def test_export_names_its_file_so_that_comfyui_lists_it_and_does_not_replace_its_source(run, tmp_path):
    done("export", run, "--out", tmp_path / "my-model")
    assert load_transformer(tmp_path / "my-model.safetensors")
    before = (tmp_path / "my-model.safetensors").read_bytes()
    assert "is the model to export, or one that it was trained from: give another --out" in refused(
        "export",
        tmp_path / "my-model.safetensors",
        "--out",
        tmp_path / "my-model.safetensors",
        "--dtype",
        "fp16",
    )
    assert (tmp_path / "my-model.safetensors").read_bytes() == before
    shutil.copy(ASSETS / "transformer.safetensors", tmp_path / "base.safetensors")
    lora, base = run / "lora" / "apt-tiny.safetensors", tmp_path / "base.safetensors"
    assert "or one that it was trained from: give another --out" in refused(
        "export", lora, "--base", base, "--out", base
    )
    assert base.read_bytes() == (ASSETS / "transformer.safetensors").read_bytes()


@pytest.fixture
def made(monkeypatch):
    """The latents that pipelines make, in order."""
    latents, real = [], OneStepPipeline.latents
    monkeypatch.setattr(OneStepPipeline, "latents", lambda *args: latents.append(real(*args)) or latents[-1])
    return latents


def test_generate_makes_the_pipelines_latents_for_any_steps_and_noise(tmp_path, made):
    model = load_transformer(GENERATOR)
    save_generator(
        tmp_path / "early.safetensors", model, model.config, read_metadata(GENERATOR) | {"second_time": 0.3}
    )
    size = {"height": 48, "width": 48, "frames": 1}
    given = [part for name, value in size.items() for part in (f"--{name}", value)]
    by_file = {}
    for file in (GENERATOR, tmp_path / "early.safetensors"):
        pipe = OneStepPipeline.from_checkpoint(file)
        for steps in (1, 2, 3):
            for noise in ("apt", "comfyui"):
                made.clear()
                done(
                    "generate",
                    file,
                    "a red circle",
                    "--steps",
                    steps,
                    "--noise",
                    noise,
                    "--seed",
                    2**40,
                    *given,
                    "--out",
                    tmp_path / "g",
                )
                pipe("a red circle", steps=steps, noise=noise, seed=2**40, **size)
                generated, piped = made
                assert torch.equal(generated, piped)
                by_file[file.stem, steps, noise] = piped
    assert torch.equal(by_file["apt_mini", 1, "apt"], by_file["early", 1, "apt"])
    different = [
        (by_file["apt_mini", steps, "apt"] - by_file["early", steps, "apt"]).abs().mean() for steps in (2, 3)
    ]
    different += [
        (by_file["apt_mini", steps, "apt"] - by_file["apt_mini", steps, "comfyui"]).abs().mean()
        for steps in (1, 2, 3)
    ]
    assert min(different) > 0.05
    made.clear()
    done("generate", GENERATOR, "a red circle", "--seed", 5, *given, "--out", tmp_path / "g")
    pipe("a red circle", seed=5, noise="apt", **size)
    assert torch.equal(*made)  # the default
    assert "noise 'gpu' is not known: use apt or comfyui." in refused(
        "generate", GENERATOR, "x", "--noise", "gpu", "--out", tmp_path / "x"
    )
    assert "guidance 7.5 is for base models, but " in refused(
        "generate", GENERATOR, "x", "--guidance", 7.5, "--out", tmp_path / "x"
    )


def test_the_discriminator_of_a_state_whole_and_as_a_lora(run):
    whole, identity = open_discriminator(run / "states" / "image")
    assert identity["phase"] == "image" and "backbone.blocks.0.attn1.to_q.weight" in whole.state_dict()
    adapted, _ = open_discriminator(run / "lora" / "states" / "video")
    state = State(resolve(run / "lora" / "states" / "video")).tensors("discriminator.weights/")
    assert state.keys() == adapted.state_dict().keys() and all(
        torch.equal(value, state[name]) for name, value in adapted.state_dict().items()
    )
    assert state["backbone.blocks.0.attn1.to_q.lora_A.weight"].shape == (3, 128)
    assert max(value.abs().max() for name, value in state.items() if "lora_B" in name) > 0


def test_a_presets_second_time_reaches_what_is_made_from_a_state(run):
    for source in (
        find_source(run / "states" / "image"),
        find_source(run / "lora" / "states" / "video"),
        find_source(run / "states" / "distill"),
    ):
        assert source.few_step and source.second_time == 0.6


def test_generate_with_a_tiny_decoder_says_so(run, tmp_path):
    save_file(TinyDecoder(16).state_dict(), tmp_path / "taew2_1.safetensors")
    shown = done(
        "generate",
        run,
        "x",
        "--text-encoder",
        "mini",
        "--tiny-decoder",
        tmp_path / "taew2_1.safetensors",
        "--out",
        tmp_path / "t",
    )
    assert "stands in for the VAE: these pictures are near the VAE's own, not equal to them." in " ".join(
        shown.split()
    )
    assert len(list((tmp_path / "t").iterdir())) == 1


def test_generate_refuses_what_cannot_be_made(run, tmp_path):
    files = ["--vae", "mini", "--text-encoder", "mini", "--out", tmp_path / "x"]
    assert "there is no prompt" in refused("generate", run, *files)
    assert "height 50 must be a multiple of 16 (48 or 64)" in refused(
        "generate", run, "x", "--height", 50, *files
    )
    tensors, header = read_tensors(run / "apt-tiny.safetensors")
    # the miniature's parts are found
    about = json.dumps(json.loads(header.metadata["apt"]) | {"base": "other"})
    write_tensors(tmp_path / "other.safetensors", tensors, header.metadata | {"apt": about})
    assert "vae is not given: add vae=PATH of the VAE" in refused(
        "generate", tmp_path / "other.safetensors", "x", "--text-encoder", "", "--out", tmp_path / "x"
    )
    assert "nowhere does not exist: give a checkpoint file" in refused("generate", "nowhere", "x", *files)
    assert not (tmp_path / "x").exists()


def test_inspect_says_what_it_is_and_whether_it_loads(run, tmp_path):
    facts = inspect(run / "apt-tiny.safetensors", deep=True)
    assert (
        facts["what"] == "Wan transformer, official keys"
        and facts["loads"]
        == "yes, as checkpoint, in one step; needs a vae of 16 channels (Wan 2.1) and "
        "a text_encoder of width 96"
        and facts["phase"] == "video"
    )
    assert facts["shape"].startswith("6 blocks, 4 heads x 32 = width 128, ffn 512, 16 latent channels")
    assert (
        inspect(run / "lora" / "apt-tiny.safetensors")["rank"] == "3"
        and "LoRA" in inspect(run / "lora")["what"]
    )
    assert (
        inspect(ASSETS / "vae" / "apt_mini_vae.safetensors")["what"] == "Wan VAE, official keys, version 2.1"
    )
    assert inspect(ASSETS / "text_encoder.safetensors") | {"tokenizer": "inside"} == inspect(
        ASSETS / "text_encoder.safetensors"
    )
    shards, state = inspect(run / "latents"), inspect(run / "states" / "image")
    assert (
        shards["images"].startswith("8 (8 of 16x1x6x6)")
        and shards["videos"].startswith("8 (8 of 16x3x6x6)")
        and shards["loads"] == "yes"
    )
    assert state["what"] == "training state" and state["update"] == "2"
    settings = dict(line.split(maxsplit=1) for line in state["settings"].splitlines())
    about = json.loads((run / "states" / "image" / "step-000002" / "run.json").read_text())["identity"]
    assert settings["phase"] == "image" and settings["batch"] == str(about["batch"])
    assert settings["taps"] == ", ".join(map(str, about["taps"])) and settings["lr_heads"] == "none"
    assert "{" not in state["settings"] and settings["train_backbone"] == "true"
    tensors, header = read_tensors(run / "apt-tiny.safetensors")
    del tensors["head.head.weight"]
    write_tensors(tmp_path / "part.safetensors", tensors, header.metadata)
    assert (
        inspect(tmp_path / "part.safetensors")["loads"].startswith("no: ")
        and "head.head.weight missing" in inspect(tmp_path / "part.safetensors")["loads"]
    )
    assert "nowhere does not exist" in refused("inspect", "nowhere")


def test_prompts_are_encoded_with_the_shards(run):
    prompts = Prompts(run / "latents")
    (embedding,) = prompts.encode(["blurry, broken, deformed, bad quality"])
    assert embedding.shape[1] == prompts.dim == 96 and prompts.text_length == 32
    with pytest.raises(
        ValueError, match='the prompt "other" was not encoded with the shards: run precompute again'
    ):
        prompts.encode(["other"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ("adversarial", TINY, "--phase", "image", "updtes=2"),
            "there is no setting 'updtes' (did you mean updates?)",
        ),
        (("adversarial", TINY, "--phase", "film"), "--phase film is not known: use image or video."),
        (
            ("adversarial", TINY, "--phase", "image", "--recipe", "wild"),
            "preset tiny has no recipe 'wild': use one of paper, stable.",
        ),
        (
            ("adversarial", TINY, "--phase", "image", "batch=5", "microbatch=2"),
            "batch=5 does not divide over 1 groups of processes of 2 samples at once: use 4 or 6.",
        ),
        (
            ("distill", "wan2.1-1.3b-480p"),
            "base is not given: add base=PATH of the transformer: a diffusers folder or a .safetensors file.",
        ),
        (("distill", "wan2.1-1.3b-480p", "base=/nowhere"), "base /nowhere does not exist"),
        (
            ("distill", "wan2.1-1.3b-480p", "method=dmd"),
            "base is not given: add base=PATH of the transformer: a diffusers folder or a .safetensors file.",
        ),
        (
            ("distill", "wan2.1-1.3b-480p", f"base={ASSETS / 'transformer.safetensors'}"),
            "is not the model of preset wan2.1-1.3b-480p (blocks 6 instead of 30, heads 4 instead of 12",
        ),
        (
            ("precompute", "wan2.1-1.3b-480p"),
            "data is not given, and only the miniature (48x48) draws its own",
        ),
        (
            ("adversarial", TINY, "--phase", "image", "context_parallel=3"),
            "context_parallel=3 does not divide the 4 attention heads of tiny: use 2.",
        ),
        (
            ("adversarial", TINY, "--phase", "image", "attention=flush"),
            "there is no attention backend 'flush' (did you mean flash?): use auto, or one of",
        ),
        (
            ("distill", TINY, "attention=flash"),
            (
                "attention backend flash needs flash-attn, which is not installed or does not load: "
                "install it, or use native."
            ),
        ),
        (
            ("distill", TINY, "attention=flash", "--dry-run"),
            "attention backend flash needs flash-attn, which is not installed or does not load",
        ),
        (
            ("distill", TINY, "attention=_native_cudnn"),
            "needs 16-bit values on a CUDA card, but this is float32 on cpu: use native.",
        ),
        (
            ("distill", "wan2.2-5b", "attention=flush", "--dry-run", "--gpus", 8),
            "there is no attention backend 'flush'",
        ),
    ],
)
def test_mistakes_are_known_before_the_first_step(arguments, sentence, tmp_path):
    assert sentence in refused(*arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_shards_that_do_not_fit_are_refused(run, tmp_path):
    index = json.loads((run / "latents" / "index.json").read_text(encoding="utf-8"))
    for change, sentence in (
        (
            {"vae": {"stride": [4, 8, 8], "channels": 48}},
            "has latent channels 48, but tiny needs 16: precompute the shards for this model.",
        ),
        ({"text": {"dim": 96, "length": 512}}, "has text length 512, but tiny needs 32"),
        (
            {"vae": {"stride": [4, 16, 16], "channels": 16}},
            "has VAE stride (4, 16, 16), but tiny needs (4, 8, 8)",
        ),
        ({"settings": index["settings"] | {"vae": "0" * 32}}, "was made with another vae than mini"),
        (
            {"settings": index["settings"] | {"text encoder": "0" * 32}},
            "was made with another text_encoder than mini",
        ),
    ):
        folder = tmp_path / "latents"
        folder.mkdir(exist_ok=True)
        for path in (run / "latents").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        changed = index | change
        changed["fingerprint"] = shards.fingerprint_of(
            changed["settings"], [shards.read_sample(entry) for entry in index["samples"]]
        )
        (folder / "index.json").write_text(json.dumps(changed))
        assert sentence in refused("distill", TINY, "--shards", folder, "--out", tmp_path / "out")


def test_another_run_in_the_same_folder_is_refused(run):
    assert "holds a run with another" in refused(
        "adversarial", TINY, "--phase", "image", "lr_generator=1e-5", *STATES, "--out", run
    )


def test_with_the_folder_deleted_that_the_sentence_names_the_phase_begins_anew(run, tmp_path):
    """As in a folder where it never ran, with the earlier result in its place until then."""
    given = ("adversarial", TINY, "--phase", "image", "r1_weight=5", *STATES, "--out")
    for out in (tmp_path / "again", tmp_path / "fresh"):
        shutil.copytree(run / "latents", out / "latents")
        shutil.copyfile(run / "distilled.safetensors", out / "distilled.safetensors")
    for name in ("states/image", "log/image", "samples/image"):
        shutil.copytree(run / name, tmp_path / "again" / name)
    result = tmp_path / "again" / "apt-image.safetensors"
    shutil.copyfile(run / result.name, result)
    states = tmp_path / "again" / "states" / "image"
    assert refused(*given, tmp_path / "again") == (
        f"{states} holds a run with another r1_weight (100.0, now 5.0): give another --out, or the settings "
        "of that run, or delete that folder, and those of later stages, to begin anew."
    )
    before = read_tensors(result)[0]
    shutil.rmtree(states)
    for out in (tmp_path / "again", tmp_path / "fresh"):
        done(*given, out)
    after, fresh = (read_tensors(path)[0] for path in (result, tmp_path / "fresh" / result.name))
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)
    assert not all(torch.equal(after[name], before[name]) for name in fresh)
    updates = [line.split(",")[0] for line in (states.parents[1] / "log/image/history.csv").open()]
    assert updates == ["update", "1", "2"]
    facts = json.loads((states / "step-000002" / "run.json").read_text())
    assert facts["identity"]["r1_weight"] == 5.0


def test_a_runs_folder_and_its_states_are_no_start_and_the_sentence_says_what_is(run, tmp_path):
    given = ("adversarial", TINY, "--phase", "video", "--out", tmp_path / "out", "--start-from")
    assert refused(*given, run).endswith(
        f"is the folder of a run: give the file in it, {run}/apt-tiny.safetensors."
    )
    state = run / "states" / "image" / "step-000002"
    for path, what in ((state, "a training state"), (state.parent, "a folder of training states")):
        sentence = refused(*given, path)
        assert (
            sentence
            == f"--start-from {path} is {what}, and a start is weights alone: write them to a file with "
            f"`export {state} --out FILE --dtype fp32`, and give that."
        )
    adapters = run / "lora" / "states" / "video"
    assert f"`export {adapters}/step-000002 --out FILE --form lora --dtype fp32`" in refused(*given, adapters)
    (tmp_path / "begun" / "latents").mkdir(parents=True)
    assert "is the folder of a run that has finished no stage: give a file of weights" in refused(
        *given, tmp_path / "begun"
    )
    done("export", state, "--out", tmp_path / "start.safetensors", "--dtype", "fp32")
    done(*given, tmp_path / "start.safetensors", "updates=1", "--shards", run / "latents")


def test_a_lora_over_a_whole_few_step_model(run, tmp_path):
    """As the sentence about whole models says: the same file is base and start, and the LoRA names it."""
    few, out = tmp_path / "few-step.safetensors", tmp_path / "out"
    shutil.copy(run / "distilled.safetensors", few)
    given = ("adversarial", TINY, "--phase", "video", "mode=lora", "lora_rank=2", "updates=1")
    where = ("--shards", run / "latents", "--out", out, "--start-from", few)
    assert f"or give base={few} too, to train a LoRA over that model." in refused(*given, *where)
    done(*given, f"base={few}", *where)
    assert read_metadata(out / "apt-tiny.safetensors")["over"] == "few-step.safetensors"
    made = open_generator(out / "apt-tiny.safetensors", few)
    change = (
        merged_state(made.base, "generator")["blocks.0.attn1.to_q.weight"]
        - read_tensors(few)[0]["blocks.0.self_attn.q.weight"]
    )
    assert 0 < change.abs().max() < 1e-3  # of one update at a rate of 1e-4


def test_a_phase_without_the_stage_before_says_where_it_starts(run, tmp_path):
    shown = done(
        "adversarial",
        TINY,
        "--phase",
        "image",
        "updates=1",
        "save_every=0",
        "--shards",
        run / "latents",
        "--out",
        tmp_path,
    )
    assert "distilled.safetensors does not exist, so the generator starts from the base itself" in shown


def test_dry_run_touches_no_weight():
    shown = done(
        "adversarial",
        "wan2.2-5b",
        "--phase",
        "video",
        "mode=lora",
        "--dry-run",
        "--gpus",
        1,
        "--gpu-memory",
        32,
        "--out",
        "nowhere",
    )
    for part in ("4,999,787,712", "161,218,560", "11,440", "It fits: 24.6 of 30.1 GiB"):
        assert part in shown
    assert "add train.mode=lora" in refused(
        "adversarial", "wan2.2-5b", "--phase", "video", "--dry-run", "--gpus", 1, "--out", "nowhere"
    )
    assert not Path("nowhere").exists()
    split = ("--phase", "video", "--dry-run", "r1_sigma=0.01", "r1_sigma_time=0.1")
    penalties = [line.split() for line in done("adversarial", TINY, *split).splitlines() if "sigma^2" in line]
    assert penalties == ["lambda sigma^2 of aR1 0.01".split(), "lambda sigma^2 of aR1, time 1".split()]
    here = command("distill", TINY, "attention=_native_math", "--dry-run").output
    assert ["attention", "_native_math"] in [line.split() for line in here.splitlines()]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_stage_1_by_distribution_matching_and_stage_2_from_it(run, tmp_path, mode):
    given = (TINY, f"mode={mode}", "lora_rank=3", "--shards", run / "latents", "--out", tmp_path)
    dmd = ("method=dmd", "updates=2", "fake_updates=1")
    shown = done("distill", *given, *dmd, "--dry-run")
    assert "tiny, distill (dmd)" in shown and "parameters, fake score's LoRA" in shown
    assert not (tmp_path / "states").exists()
    done("distill", *given, *dmd)
    history = (tmp_path / "log" / "distill" / "history.csv").read_text().splitlines()
    assert len(history) == 3 and "fake_loss_" in history[0] and "cd_loss" not in history[0]
    left = inspect(tmp_path / "distilled.safetensors")
    assert ("LoRA" in left["what"]) == (mode == "lora") and left["phase"] == "distilled"
    done("adversarial", *given, "--phase", "image", "updates=1")
    assert (tmp_path / "apt-image.safetensors").is_file()


def test_attention_is_told_and_no_part_of_a_runs_identity(run, tmp_path):
    """A run that goes on with another kernel is the same run."""
    for updates, attention in ((1, "_native_math"), (2, "auto")):
        shown = done(
            "adversarial",
            TINY,
            "--phase",
            "image",
            f"updates={updates}",
            f"attention={attention}",
            *STATES,
            "--shards",
            run / "latents",
            "--out",
            tmp_path,
        )
        kernel = "native" if attention == "auto" else attention
        assert (
            f"attention: {kernel} in all passes of generator and discriminator; "
            "native in the discriminator's heads, which compute in fp32" in shown.splitlines()
        )
    assert sorted(path.name for path in (tmp_path / "states" / "image").glob("step-*")) == [
        "step-000001",
        "step-000002",
    ]


def test_a_sample_is_the_same_whatever_comes_before_it(run, monkeypatch):
    """Number 1 alone equals number 1 of many: what lets many processes share the prompts."""
    generator = open_generator(run / "apt-image.safetensors").model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # kernels round by the size of the batch
    text = torch.randn(1, 32, 96).double()
    alone = one_step(generator, sample_noise([1], (16, 1, 6, 6), 0, "generate/z").double(), text)
    both = one_step(
        generator, sample_noise([0, 1], (16, 1, 6, 6), 0, "generate/z").double(), text.expand(2, -1, -1)
    )
    torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-10)
