"""CLIP score: on a tiny CLIP model with random weights, against the formula written out."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from apt_core.errors import AptError
from trainer.__main__ import app
from trainer.digest import file_digest
from trainer.evaluate.choice import chosen
from trainer.evaluate.clip_score import ClipScore, read_clip
from trainer.mini.clips import draw

CPU, SIZE, LENGTH = torch.device("cpu"), 32, 12
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def save_clip(folder: Path) -> Path:
    """A CLIP model as transformers saves it; its tokenizer knows the letters, each alone and at the end."""
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    model = CLIPModel(
        CLIPConfig(
            text_config=common | text,
            vision_config=common | {"image_size": SIZE, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):  # each version of transformers draws others
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
        # without their common part, cosines have both signs
        frames = torch.from_numpy(clips().reshape(-1, 40, 56, 3)[:, 4:36, 12:44]).permute(0, 3, 1, 2) / 255
        x = (frames - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        common_part = model.vision_model(x).pooler_output.mean(0, keepdim=True)
        weight = model.visual_projection.weight
        weight -= weight @ common_part.T @ common_part / common_part.square().sum()
    model.save_pretrained(folder)
    norms = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(norms))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


def table(folder: Path, where: Path, **settings) -> Path:
    given = {"path": str(folder)} | settings
    lines = "\n".join(f"{key} = {value!r}" for key, value in given.items())
    (where / "clip.toml").write_text(f"[clip]\n{lines}\n")
    return where / "clip.toml"


def scorer(folder: Path, where: Path, **settings) -> ClipScore:
    return ClipScore(read_clip(table(folder, where, **settings)), CPU)


def by_hand(folder: Path, clip: np.ndarray, words: str) -> list[float]:
    """The cosine of each frame with the text: Pillow's preprocessing, tokens by hand, the model's forward."""
    model, pixels = CLIPModel.from_pretrained(folder).eval(), []
    for frame in clip:
        image = Image.fromarray(frame)
        scale = SIZE / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - SIZE) // 2 for side in image.size)
        image = image.crop((left, top, left + SIZE, top + SIZE))
        pixels.append((np.asarray(image) / 255 - MEAN) / STD)
    ids = [26 * (n == len(word) - 1) + ord(c) - 97 for word in words.split() for n, c in enumerate(word)]
    ids = torch.tensor([[52, *ids[: LENGTH - 2], 53]])
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=x, attention_mask=torch.ones_like(ids))
    image, text = out.image_embeds.double().numpy(), out.text_embeds[0].double().numpy()
    return list(image @ text / np.linalg.norm(image, axis=1) / np.linalg.norm(text))


def clips() -> np.ndarray:
    """Three clips of five frames, 40 x 56, whose frames differ much."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 5, 5, 7, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=2).repeat(8, axis=3)


def test_the_score_is_the_formula(folder, tmp_path):
    score, cosines = scorer(folder, tmp_path), []
    for words in ("red ball", "a cat", "z", "a text that is longer than the model takes"):
        for clip in clips():
            cosines.append(by_hand(folder, clip, words))
            wanted = np.mean([100 * max(cos, 0) for cos in cosines[-1]])
            assert score(clip, words) == pytest.approx(wanted, abs=0.05)  # Pillow rounds otherwise
    cosines = 100 * np.array(cosines)
    assert cosines.min() < -5 and cosines.max() > 5 and np.ptp(cosines.mean(1)) > 5
    mixed = [row for row in cosines if row.min() < 0 < row.max()]
    assert mixed  # where the mean of the clamped is not the clamped mean


def test_shards_score_as_the_whole(folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded, ignore=shutil.ignore_patterns("model.safetensors"))
    CLIPModel.from_pretrained(folder).save_pretrained(sharded, max_shard_size="20KB")
    shards = sorted(sharded.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (sharded / "model.safetensors").exists()
    clip = clips()[0]
    (tmp_path / "a").mkdir()
    assert scorer(sharded, tmp_path)(clip, "cat") == scorer(folder, tmp_path / "a")(clip, "cat") != 0
    lines = "".join(f"{file_digest(shard)}  {shard.name}\n" for shard in shards)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert read_clip(table(sharded, tmp_path, sha256=digest)).sha256 == digest
    assert f"has SHA-256 {digest}, but" in refused(table(sharded, tmp_path, sha256="0" * 64))
    shards[1].rename(tmp_path / "away")
    said = refused(table(sharded, tmp_path))
    assert (
        said
        == f"{shards[1]} is missing, which model.safetensors.index.json names: copy or download it again."
    )


def test_it_does_not_depend_on_the_batch(folder, tmp_path):
    clip = clips()[0]
    one, two, many = (scorer(folder, tmp_path, batch=batch)(clip, "cat") for batch in (1, 2, 16))
    assert one == pytest.approx(many, abs=1e-4) and two == pytest.approx(many, abs=1e-4)


def test_frames_are_resized_and_cropped_as_pillow_does(folder, tmp_path):
    frame = clips()[0][:1].copy()
    frame[:, :, :4] = 0  # the crop leaves this edge out
    made = scorer(folder, tmp_path).prepare(torch.from_numpy(frame).permute(0, 3, 1, 2))
    assert made.shape == (1, 3, SIZE, SIZE)
    image = Image.fromarray(frame[0]).resize((44, SIZE), Image.Resampling.BICUBIC).crop((6, 0, 38, SIZE))
    wanted = (np.asarray(image) / 255 - MEAN) / STD
    assert np.abs(made[0].permute(1, 2, 0).numpy() - wanted).max() < 1.01 / 255 / min(STD)


def refused(path: Path) -> str:
    with pytest.raises(AptError) as error:
        ClipScore(read_clip(path), CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_other_weights_are_one_sentence(folder, tmp_path):
    digest = file_digest(folder / "model.safetensors")
    assert read_clip(table(folder, tmp_path)).sha256 == digest
    assert read_clip(table(folder, tmp_path, sha256=digest.upper())).sha256 == digest
    said = refused(table(folder, tmp_path, sha256="0" * 64))
    assert f"model.safetensors has SHA-256 {digest}, but {tmp_path / 'clip.toml'} says {'0' * 64}" in said
    said = refused(table(tmp_path / "none", tmp_path, sha256=digest))
    assert f"{tmp_path / 'none'} does not hold model.safetensors, model.safetensors.index.json or " in said
    assert f"with SHA-256 {digest} and its tokenizer there" in said
    assert "sha256 is not valid" in refused(table(folder, tmp_path, sha256="12"))
    assert "size is not valid" in refused(table(folder, tmp_path, size=3))


def test_a_folder_that_holds_no_clip_model_is_one_sentence(tmp_path):
    folder = save_clip(tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(table(folder, tmp_path))
    assert "broken cannot be read as a CLIP model (its weights lack text_model.encoder.layers.2" in said
    (folder / "config.json").write_text("{")
    assert "broken cannot be read as a CLIP model" in refused(table(folder, tmp_path))


def test_its_table_chooses_it(folder, tmp_path):
    path = table(folder, tmp_path)
    assert "clip_score" in chosen(None, path) and "fd" not in chosen(None, path)
    assert chosen("motion, clip_score", path) == ["motion", "clip_score"]
    with pytest.raises(AptError, match=r"clip_score needs --features FILE.toml with a \[clip\] table"):
        chosen("clip_score", None)
    with pytest.raises(AptError, match=r"fd needs --features FILE.toml with a \[\[features\]\] table"):
        chosen("fd", path)
    with pytest.raises(AptError, match="clip.toml is only used by clip_score: add that to --metrics"):
        chosen("motion", path)


def test_evaluate_scores_each_clip_with_its_own_prompt(folder, tmp_path):
    from apt_core.engine.pipeline import OneStepPipeline
    from trainer.mini import GENERATOR

    (tmp_path / "prompts.txt").write_text("a red circle\nblue square\n")
    (tmp_path / "real").mkdir()
    for name, frame in zip("ab", draw(0, range(2), False)[0]):
        Image.fromarray(frame.reshape(-1, *frame.shape[-3:])[0]).save(tmp_path / "real" / f"{name}.png")
    (tmp_path / "real" / "a.txt").write_text("green dot")
    out, features = tmp_path / "out", table(folder, tmp_path)
    given = ["mini", "--prompts", tmp_path / "prompts.txt", "--data", tmp_path / "real", "--frames", 1]
    given += ["--count", 2, "--features", features, "--metrics", "contrast,clip_score", "--out", out]
    done = CliRunner().invoke(app, ["evaluate", *map(str, given)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads((out / "evaluation.json").read_text())
    (model,), score = result["models"], scorer(folder, tmp_path)
    videos = OneStepPipeline.from_checkpoint(GENERATOR)(
        ["a red circle", "blue square"], seed=0, count=2, frames=1
    )
    words = ["a red circle", "a red circle", "blue square", "blue square"]
    wanted = [score(video.frames, said) for video, said in zip(videos, words)]
    assert len(set(wanted)) == 4 and max(wanted) > 1
    assert [clip["metrics"]["clip_score"] for clip in model["clips"]] == pytest.approx(wanted, abs=1e-3)
    assert model["metrics"]["clip_score"]["value"] == pytest.approx(np.mean(wanted), abs=1e-3)
    real = result["real"]["clips"]
    assert real[0]["metrics"]["clip_score"] is not None and real[1]["metrics"]["clip_score"] is None
    (used,) = result["features"]
    assert (used["name"], used["file"]) == ("clip_score", "tiny")
    assert used["sha256"] == file_digest(folder / "model.safetensors")
    assert used["sha256"] in (out / "evaluation.html").read_text()
    assert "clip_score" in (out / "clips.csv").read_text().splitlines()[0]
