"""A real ComfyUI server with the pack: its list of nodes, the miniature's clips, equal latents, and what it
says to bad input.
"""

import json
import re
import shutil
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from cards import read_video
from interface import WORDS, interface, is_ours, read_snapshot, words
from prompts import (
    MINI,
    NATIVE,
    custom,
    mini_image,
    mini_latents,
    mini_video,
    node,
    saving_latents,
    stock_latents,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server import Rejected, failure

from apt_core.files.checkpoint_header import read_header, read_metadata
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from apt_core.method.generator import one_step
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD
from trainer.mini import ASSETS, GENERATOR, VAE
from trainer.mini.clips import scene
from trainer.mini.judge import read_clip

CAPTION = "a red circle moving left on a green background"


def test_the_public_interface_is_that_of_the_snapshot(server):
    ours = {
        name: interface(info) for name, info in sorted(server.get("/object_info").items()) if is_ours(info)
    }
    snapshot = {name: nodes for name, nodes in read_snapshot().items() if name.startswith("APT")}
    # As text, for the order of inputs is part of it.
    assert json.dumps(ours, indent=1) == json.dumps(snapshot, indent=1)


def test_the_words_are_those_that_were_translated(server):
    translated = json.loads(WORDS.read_text(encoding="utf-8"))
    assert words(server.get("/object_info")) == translated, (
        "translate what has changed, then build_workflows.py"
    )


def test_the_locales_are_served(server):
    served = server.get("/i18n")
    for folder in (WORDS.parents[2] / "locales").iterdir():
        ours = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert served[folder.name]["nodeDefs"] == ours


def test_every_node_is_explained(server):
    for name, info in server.get("/object_info").items():
        if not is_ours(info):
            continue
        assert name.startswith("APT") and info["category"].split("/")[0] == "APT" and info["description"]
        for section in ("required", "optional"):
            for key, (_, options) in info["input"].get(section, {}).items():
                assert len(options["tooltip"]) > 20, (name, key)
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-APT/docs/{name}.md") as page:
            assert info["display_name"] in page.read().decode()


def test_the_workflows_are_offered_as_templates(server):
    names = server.get("/workflow_templates")["ComfyUI-APT"]
    files = Path(__file__).parents[2] / "example_workflows"
    assert sorted(names) == sorted(path.stem for path in files.glob("*.json")) and len(names) == 14
    for name in names:
        assert server.get(f"/api/workflow_templates/ComfyUI-APT/{name}.json")["nodes"]
        with urllib.request.urlopen(f"{server.url}/api/workflow_templates/ComfyUI-APT/{name}.jpg") as picture:
            assert picture.read(2) == b"\xff\xd8"


def test_the_pack_is_silent(server):
    start, _ = server.log().split("Starting server", 1)
    (line,) = [line for line in start.splitlines() if "ComfyUI-APT" in line]
    # ComfyUI's own list of import times; IMPORT FAILED would be in it
    assert re.search(r"\d\.\d seconds: \S*ComfyUI-APT$", line)


def test_clips_show_what_their_prompts_say(server):
    right, total = Counter(), 10
    for index in range(total):
        drawn = scene(99, index, moving=True)
        (path,) = server.run(mini_video(drawn.caption, seed=index))["save"]
        pixels = read_video(path)
        assert path.suffix == ".mp4" and pixels.shape == (9, 48, 48, 3)
        right.update(word for word, said in read_clip(pixels).agrees(drawn).items() if said)
    # Chance would be 1 in 5, 1 in 5 and 1 in 4. Whole shapes are what the generator is worst at; the README
    # has its figures.
    least = {"background": 9, "color": 9, "direction": 5}
    assert all(right[word] >= least[word] for word in least), right


@pytest.mark.parametrize("height, width, frames", [(48, 48, 9), (64, 32, 1)])
def test_latents_of_our_sampler_of_ksampler_and_of_apt_core_are_equal(server, height, width, frames):
    checkpoint, seed = "apt_mini_fp32.safetensors", 1234
    ours = mini_latents(CAPTION, seed, custom(width, height, frames), checkpoint)
    latents = {}
    for name, prompt in (
        ("ours", ours),
        ("stock", stock_latents(CAPTION, seed, checkpoint, width, height, frames)),
    ):
        (path,) = server.run(saving_latents(prompt, name))["save"]
        latents[name] = load_file(path)["latent_tensor"]

    z = torch.randn(
        1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)
    )
    encoder = load_text_encoder(ASSETS / "text_encoder.safetensors")
    text = encoder.pad(encoder.encode([CAPTION]), encoder.text_length)
    with torch.no_grad():
        clean = one_step(load_transformer(GENERATOR), z, text)
    mean, std = (torch.tensor(values["2.1"]).view(-1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    assert torch.equal(latents["ours"], latents["stock"])
    torch.testing.assert_close((latents["ours"] - mean) / std, clean, rtol=0, atol=1e-4)


def test_a_saved_checkpoint_is_listed_and_makes_the_same_latents(server):
    prompt = mini_latents(CAPTION, 7, custom(48, 48, 1))
    save = node(
        "APTSaveCheckpoint", model=["model", 0], filename_prefix="diffusion_models/kept", dtype="default"
    )
    entry = server.wait(server.queue(saving_latents(prompt | {"keep": save}, "before")))
    assert entry["outputs"]["keep"]["text"] == ["Saved diffusion_models/kept_00001_.safetensors"], failure(
        entry
    )
    (before,) = server.files(entry["outputs"]["save"])
    inputs = server.get("/object_info/APTLoadCheckpoint")["APTLoadCheckpoint"]["input"]["required"]
    assert "kept_00001_.safetensors" in inputs["checkpoint"][1]["options"]
    prompt = mini_latents(CAPTION, 7, custom(48, 48, 1), "kept_00001_.safetensors")
    (after,) = server.run(saving_latents(prompt, "after"))["save"]
    assert torch.equal(load_file(before)["latent_tensor"], load_file(after)["latent_tensor"])
    saved = server.output / "diffusion_models" / "kept_00001_.safetensors"
    assert read_metadata(saved) == read_metadata(GENERATOR)
    assert json.loads(read_header(saved).metadata["prompt"])["keep"]["class_type"] == "APTSaveCheckpoint"


def test_an_item_of_a_batch_is_the_same_alone(server):
    size, seed = custom(48, 48, 1, batch_size=3), 40
    (batch,) = server.run(saving_latents(mini_latents(CAPTION, seed, size), "batch"))["save"]
    (alone,) = server.run(saving_latents(mini_latents(CAPTION, seed + 2, custom(48, 48, 1)), "alone"))["save"]
    batch, alone = (load_file(path)["latent_tensor"] for path in (batch, alone))
    assert not torch.equal(batch[0], batch[2])
    # Latents of up to 5; a batch is summed in another order than one item.
    torch.testing.assert_close(batch[2:], alone, rtol=0, atol=5e-5)


def complaint(server, prompt: dict) -> str:
    """What the user is told about a bad prompt, at once or when the node runs: `node id: sentence`."""
    try:
        prompt_id = server.queue(prompt)
    except Rejected as rejected:
        return rejected.sentences[0]
    return failure(server.wait(prompt_id))


def decoding(**inputs) -> dict:
    """The miniature's video prompt with other inputs to its decode."""
    prompt = mini_video(CAPTION, 0)
    prompt["video"]["inputs"] |= inputs
    return prompt


SIGMAS = {"extra": node("ManualSigmas", sigmas="0.9, 0.5")}
WALK = {"extra": node("APTNoiseWalk", seeds="1 2", closed=False)}
IMAGE_LATENT = {"extra": node("EmptySD3LatentImage", width=64, height=64, batch_size=1)}
# What is wrong: (prompt, pattern of the answer)
BAD = {
    "side": (
        mini_image(CAPTION, 0, custom(50, 48, 9)),
        r"APTEmptyLatent: Empty APT Latent: 50x48 with 9 frames .*: 48x48 with 9 .*\.",
    ),
    "frames": (
        mini_image(CAPTION, 0, custom(48, 48, 8)),
        r"APTEmptyLatent: Empty APT Latent: 48x48 with 8 frames .*: 48x48 with 9 .*\.",
    ),
    "steps": (mini_image(CAPTION, 0, NATIVE, steps=9), "APTSampler: Value 9 bigger than max of 8: steps"),
    "times": (
        mini_image(CAPTION, 0, NATIVE, sigmas=["extra", 0]) | SIGMAS,
        r"APTSampler: APT One-Step Sampler: the sigmas are 0\.9, 0\.5, but they must start at 1 .*\.",
    ),
    "seeds": (
        mini_image(CAPTION, 0, NATIVE, noise=["extra", 0]) | WALK,
        r'APTNoiseWalk: Custom validation failed for node: .*APT Noise Walk: seeds is "1 2", but .*\.',
    ),
    "text": (
        mini_latents(CAPTION, 0, custom(48, 48, 1), "wan2.1_1.3B_apt.safetensors"),
        (
            r"APTSampler: APT One-Step Sampler: the prompt has embeddings of 96 channels, but this model"
            r" reads 4096: .*\."
        ),
    ),
    "latent of another VAE": (
        decoding(samples=["extra", 0]) | IMAGE_LATENT,
        (
            r"APTVAEDecodeToVideo: APT VAE Decode to Video: the latent is \[1, 16, 8, 8\], but this VAE takes"
            r" .*\."
        ),
    ),
    "fps": (decoding(fps=0.5), "APTVAEDecodeToVideo: Value 0.5 smaller than min of 1.0: fps"),
    "no such file": (
        mini_latents(CAPTION, 0, NATIVE, "nowhere.safetensors"),
        "APTLoadCheckpoint: Value not in list: .*nowhere.safetensors.*",
    ),
    "a LoRA": (
        mini_latents(CAPTION, 0, NATIVE, "lora.safetensors"),
        r"APTLoadCheckpoint: Load APT Checkpoint: .*lora.safetensors is a LoRA, .*\.",
    ),
    "half a file": (
        mini_latents(CAPTION, 0, NATIVE, "half.safetensors"),
        r"APTLoadCheckpoint: Load APT Checkpoint: .*half.safetensors.*\.",
    ),
    "no Wan": (
        mini_latents(CAPTION, 0, NATIVE, "vae.safetensors"),
        r"APTLoadCheckpoint: Load APT Checkpoint: .*vae.safetensors.*\.",
    ),
}


@pytest.fixture(scope="module")
def bad_files(server):
    folder = server.models / "diffusion_models"
    shutil.copy(server.models / "loras" / "wan2.1_1.3B_apt_lora.safetensors", folder / "lora.safetensors")
    shutil.copy(VAE, folder / "vae.safetensors")
    whole = GENERATOR.read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_a_sentence(server, bad_files, case):
    prompt, sentence = BAD[case]
    prompt = prompt if "save" in prompt else saving_latents(prompt, "bad")
    said = complaint(server, prompt)
    assert re.fullmatch(sentence, said, re.DOTALL), said
    assert "\n" not in said


def test_a_model_that_was_never_adversarially_trained_is_named(server):
    prompt = mini_latents(CAPTION, 0, custom(48, 48, 1), "wan2.1_t2v_1.3B_fp16.safetensors")
    prompt = {
        "model": prompt["model"],
        "latent": prompt["latent"],
        "save": node("SaveLatent", samples=["latent", 0], filename_prefix="plain"),
    }
    entry = server.wait(server.queue(prompt))
    (text,) = entry["outputs"]["model"]["text"]
    assert text.startswith(
        "wan2.1_t2v_1.3B_fp16.safetensors has no metadata that tells of adversarial training"
    )
    assert text in server.log()


def changed(source: Path, target: Path, name: str) -> None:
    """`source` under `target`, one of its weights doubled: as large, and of another time."""
    with safe_open(source, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        weights[name] = 2 * weights[name]
        save_file(weights, target, file.metadata())


@pytest.mark.parametrize(
    "node_id, folder, source, weight",
    [
        ("model", "diffusion_models", GENERATOR, "head.head.weight"),
        ("clip", "text_encoders", ASSETS / "text_encoder.safetensors", "shared.weight"),
    ],
)
def test_a_file_that_is_replaced_under_its_name_is_loaded_again(server, node_id, folder, source, weight):
    target = server.models / folder / "changing.safetensors"
    shutil.copy(source, target)
    prompt = mini_latents(CAPTION, 3, custom(48, 48, 1), checkpoint=MINI)
    prompt[node_id]["inputs"]["checkpoint" if node_id == "model" else "text_encoder"] = target.name
    runs = []
    for _ in range(2):
        entry = server.wait(server.queue(saving_latents(prompt, "changing")))
        (path,) = server.files(entry["outputs"]["save"])
        (_, cached), *_ = (
            message for message in entry["status"]["messages"] if message[0] == "execution_cached"
        )
        runs.append((load_file(path)["latent_tensor"], node_id in cached["nodes"]))
        entry = server.wait(server.queue(saving_latents(prompt, "the same again")))
        (_, cached), *_ = (
            message for message in entry["status"]["messages"] if message[0] == "execution_cached"
        )
        assert node_id in cached["nodes"], "what has not changed is not read again"
        changed(source, target, weight)
    (before, first), (after, second) = runs
    assert not first and not second
    assert (before - after).abs().max() > 0.1


def test_what_the_user_sees_of_an_exception_is_its_sentence(server):
    entry = server.wait(server.queue(mini_image(CAPTION, 0, custom(50, 48, 9))))
    ((_, error),) = (message for message in entry["status"]["messages"] if message[0] == "execution_error")
    assert error["exception_type"] == "apt.AptError"


def test_a_prompt_that_is_too_long_is_told_on_the_node(server):
    long = saving_latents(mini_latents(" and ".join([CAPTION] * 8), 0, custom(48, 48, 1)), "long")
    entry = server.wait(server.queue(long))
    (text,) = entry["outputs"]["samples"]["text"]
    assert re.match(r"The prompt is too long: \d+ tokens, 32 at most in this model's training\. ", text)
    assert f"APT One-Step Sampler: {text}" in server.log()


def test_a_cancel_ends_the_prompt_and_not_the_server(server):
    prompt_id = server.queue(mini_video(CAPTION, 1, custom(256, 256, 81)))
    while prompt_id not in server.get(f"/history/{prompt_id}"):
        server.interrupt(prompt_id)
        time.sleep(0.1)
    entry = server.wait(prompt_id)
    assert [kind for kind, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert len(server.run(mini_video(CAPTION, 2))["save"]) == 1
