"""The whole demo in its smallest form: every stage, every file, resuming, and other people's data."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import trainer.proof.demo
from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_header, read_metadata
from apt_core.files.media_write import write_video
from apt_core.files.tensorfile import read_tensors
from apt_core.loading.checkpoint import load_transformer
from trainer.checkpoints.trained_models import open_discriminator, open_generator
from trainer.config import load_preset
from trainer.data.shards import ShardDataset
from trainer.inside.attention import find_state, look, run_attention
from trainer.inside.opening import open_pipeline
from trainer.mini import ASSETS
from trainer.mini.drawn_files import draw_files
from trainer.proof.demo import Demo, RunState
from trainer.proof.evaluate import ALL_COLUMNS, COLUMNS
from trainer.proof.measure import measure_runs
from trainer.proof.report import drawn_prompts

TINY = load_preset(Path(__file__).parents[1] / "tiny.toml")
KEYS = ("fd", "patch_fd", "sharpness", "structure", "alignment", "diversity", "calls", "samples")
SAMPLES = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    return out, Demo(out, TINY, samples=SAMPLES).run()


def assert_same_file(one, other):
    """Equal weights and metadata; safetensors writes the metadata in any order."""
    (weights, header), (expected, wanted) = read_tensors(one), read_tensors(other)
    assert header.metadata == wanted.metadata and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_report_has_every_column_and_number(run):
    out, result = run
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == result
    for name in ("columns", "image_columns"):
        assert tuple(result[name]) == COLUMNS
        for row in result[name].values():
            assert set(KEYS) <= row.keys() and row["samples"] == SAMPLES
            assert all(np.isfinite(row[key]) for key in KEYS)
        assert result[name]["real"]["structure"] == result[name]["real"]["alignment"] == 1.0
        assert [row["calls"] for row in result[name].values()] == [0, 0, 4, 1, 1, 1, 2]
    stages = {"precompute", "distill", "adversarial_image", "adversarial_video", "report"}
    assert set(result["seconds"]) == stages and result["seconds"]["report"] > 0
    assert len(result["losses"]["distill"]) == 3 and len(result["losses"]["adversarial_video"]) == 2
    assert {"d_loss", "r1", "g_loss", "logit_real", "logit_fake"} <= result["losses"]["adversarial_video"][
        0
    ].keys()
    assert result["versions"]["torch"] == torch.__version__
    assert result["settings"]["seed"] == result["seed"] == 0


def test_the_pictures_and_the_video_open(run):
    out, _ = run
    with Image.open(out / "compare.png") as sheet:
        assert sheet.width > 6 * 3 * 96
    with av.open(out / "sample.mp4") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert sum(1 for _ in container.decode(stream)) == 4 * 9


def test_the_folder_holds_its_base(run):
    out, _ = run
    held, shipped = (
        load_transformer(file).state_dict()
        for file in (out / "base.safetensors", ASSETS / "transformer.safetensors")
    )
    assert held.keys() == shipped.keys() and all(torch.equal(held[name], shipped[name]) for name in held)


def test_the_export_is_a_trained_generator_in_official_keys(run):
    out, _ = run
    header = read_header(out / "apt-tiny.safetensors")
    apt = json.loads(header.metadata["apt"])
    assert (apt["kind"], apt["phase"], apt["timestep"], apt["base"]) == ("generator", "video", 1000, "mini")
    for name, frames in (("distilled", 9), ("apt-image", 1), ("apt-tiny", 9)):
        apt = read_metadata(out / f"{name}.safetensors")
        assert (
            apt["native"] == {"height": 48, "width": 48, "frames": frames, "fps": 8}
            and apt["second_time"] == 0.6
        )
    assert "blocks.0.self_attn.q.weight" in header.shapes and "head.modulation" in header.shapes
    final, start = (
        load_transformer(out / "apt-tiny.safetensors"),
        load_transformer(out / "distilled.safetensors"),
    )
    moved = [not torch.equal(a, b) for a, b in zip(final.parameters(), start.parameters())]
    assert all(moved)


def test_its_states_hold_the_generator_and_the_discriminator(run):
    out, _ = run
    for phase, file in (("image", "apt-image.safetensors"), ("video", "apt-tiny.safetensors")):
        state = find_state(out, phase)
        assert state == out / "states" / phase / "step-000002"
        found, expected = open_generator(state), load_transformer(out / file)
        assert all(
            torch.equal(value, expected.state_dict()[name])
            for name, value in found.model.state_dict().items()
        )
        assert (
            found.metadata["native"]["frames"] == (1 if phase == "image" else 9)
            and found.metadata["base"] == "mini"
        )
        discriminator, identity = open_discriminator(state)
        assert identity["phase"] == phase and identity["shift"] == {"image": 1, "video": 12}[phase]
        base = load_transformer(ASSETS / "transformer.safetensors").state_dict()
        moved = [
            (value - base[name]).abs().max().item()
            for name, value in discriminator.backbone.state_dict().items()
        ]
        # two updates away from the original weights
        assert 0 < max(moved) < 0.01 and discriminator.logit.weight.abs().sum() > 0
    assert find_state(out) == out / "states" / "video" / "step-000002"
    with pytest.raises(AptError, match="has no discriminator: give a training state of stage 2"):
        open_discriminator(out / "states" / "distill")


def test_attention_over_its_samples(run, tmp_path):
    out, _ = run
    state = find_state(out)
    pipe = open_pipeline(state, device="cpu", cache=tmp_path / "cache")
    paths = run_attention(state, pipe, tmp_path, samples=1)
    facts = json.loads(paths[2].read_text())
    real, fake = facts["samples"]
    assert (real["source"], fake["source"]) == ("real", "generated") and real["caption"] == fake["caption"]
    # By hand, for the real one: what the discriminator of the state says of the latent in the shards.
    data = ShardDataset(out / "latents", "video")
    x, text, [caption] = data.batch([0])
    assert caption == real["caption"] and facts["taps"] == [3, 4, 6]
    discriminator, identity = open_discriminator(state)
    weights, logit = look(discriminator, x, text, identity["shift"])
    assert real["logit"] == pytest.approx(logit, abs=1e-4)
    for tap, depth in zip(facts["taps"], weights):
        shares = real["depths"][f"block {tap}"]["share_by_latent_frame"]
        assert shares == pytest.approx(depth.mean(0).sum((1, 2)).tolist(), abs=1e-4) and sum(
            shares
        ) == pytest.approx(1, abs=3e-4)
    for path in paths[:2]:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture).std() > 10


def test_a_finished_run_trains_nothing_again_and_an_interrupted_one_goes_on(run, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(run[0], out)
    state = json.loads((out / "state.json").read_text(encoding="utf-8"))
    del state["stages"]["adversarial_video"]
    (out / "state.json").write_text(json.dumps(state))
    (out / "apt-tiny.safetensors").unlink()
    monkeypatch.setattr(trainer.proof.demo, "run_distill", None)
    monkeypatch.setattr(trainer.proof.demo, "run_precompute", None)
    result = Demo(out, TINY, samples=SAMPLES).run()
    assert_same_file(out / "apt-tiny.safetensors", run[0] / "apt-tiny.safetensors")
    assert result["columns"] == run[1]["columns"]


def test_another_seed_in_the_same_folder_is_refused(run):
    with pytest.raises(AptError, match=r"holds a run with another seed \(0, now 1\): give another --out"):
        Demo(run[0], TINY, seed=1, samples=SAMPLES).run()


def test_ctrl_c_leaves_finished_stages(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.proof.demo, "run_distill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Demo(tmp_path, TINY, samples=SAMPLES).run()
    assert set(json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))["stages"]) == {"precompute"}
    assert (tmp_path / "latents" / "index.json").exists()


def test_the_stable_preset_runs_on_other_peoples_pictures(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Ein Foto Nr. {i}, caf\u00e9 \u732b", encoding="utf-8")
    large = TINY.model_copy(
        update={"data": TINY.data.model_copy(update={"image_height": 64, "image_width": 80})}
    )
    result = Demo(tmp_path / "out", large, recipe="stable", data=folder, samples=4).run()
    assert set(ShardDataset(tmp_path / "out" / "latents", "image").buckets) == {(16, 1, 8, 10)}
    for name in ("distilled", "apt-tiny"):
        assert read_metadata(tmp_path / "out" / f"{name}.safetensors")["native"] == {
            "height": 64,
            "width": 80,
            "frames": 1,
            "fps": 8,
        }
    assert result["columns"] == {} and tuple(result["image_columns"]) == COLUMNS
    assert (
        result["image_columns"]["apt_1"]["structure"] is None
        and result["image_columns"]["apt_1"]["samples"] == 4
    )
    assert load_transformer(tmp_path / "out" / "apt-tiny.safetensors") is not None
    assert len(result["losses"]["adversarial_image"]) == 3


def test_data_without_captions_stops_before_any_training(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    with pytest.raises(AptError, match="caption"):
        Demo(tmp_path / "out", TINY, data=folder).run()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_file_that_was_moved_away_is_made_again(run, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(run[0], out)
    (out / "apt-tiny.safetensors").unlink()
    monkeypatch.setattr(trainer.proof.demo, "run_distill", None)
    monkeypatch.setattr(trainer.proof.demo, "write_report", lambda *args: {})
    Demo(out, TINY, samples=SAMPLES).run()
    assert_same_file(out / "apt-tiny.safetensors", run[0] / "apt-tiny.safetensors")


def test_one_clip_a_few_pictures_and_a_bad_file(tmp_path, capsys):
    folder = tmp_path / "my [odd] folder"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_video(folder / "a.mp4", rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), 8)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("noise")
    result = Demo(tmp_path / "out [/x]", TINY, data=folder, samples=4, skip_bad=True).run()
    shown = capsys.readouterr().out
    assert "left out: " in shown and "bad.png" in shown and "1 left out, listed in " in shown
    for name, count in (("columns", 1), ("image_columns", 3)):
        for row in result[name].values():
            assert row["samples"] == count and np.isfinite(row["patch_fd"]) and row["sharpness"] > 0
            assert (row["fd"] is None, row["diversity"] is None) == (count == 1, count == 1)
    assert "NaN" not in (tmp_path / "out [/x]" / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("out", ["file", "file/inside"])
def test_an_out_that_is_a_file_is_refused_and_stays(tmp_path, out):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(
        AptError, match="cannot be made, because it or a parent of it is a file: give another folder"
    ):
        Demo(tmp_path / out, TINY).run()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"settings": 3}',
        '{"settings": {"seed": 0}}',
        '{"settings": {"seed": 0}, "stages": {"data": 1}}',
    ],
)
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(AptError, match="state.json is damaged: delete it to start over"):
        RunState(tmp_path / "state.json", {"seed": 0})


def test_a_run_of_a_version_with_fewer_settings_and_recipes_goes_on(tmp_path):
    identity = {"recipe": "paper", "seed": 0, "preset": TINY.model_dump()}
    earlier = json.loads(json.dumps(identity))
    wanted = earlier.copy()
    earlier["variant"] = earlier.pop("recipe")  # its old name
    del earlier["preset"]["distill"]["method"], earlier["preset"]["stage2"]["stable"]
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"settings": earlier, "stages": {}}))
    assert RunState(path, identity).state["settings"] == wanted
    earlier["preset"]["stage2"]["paper"]["image"]["updates"] += 1
    path.write_text(json.dumps({"settings": earlier, "stages": {}}))
    with pytest.raises(AptError, match="holds a run with another preset: give another --out"):
        RunState(path, identity)
    del earlier["preset"]["distill"]["lr"]
    path.write_text(json.dumps({"settings": earlier, "stages": {}}))
    with pytest.raises(AptError, match="holds a run with another preset: give another --out"):
        RunState(path, identity)


def test_drawn_clips_have_one_size_and_any_length(run, tmp_path):
    for side in ("width", "image_width"):
        wide = TINY.model_copy(update={"data": TINY.data.model_copy(update={side: 64})})
        with pytest.raises(AptError, match="64x48 pixels, but drawn clips have 48x48; give --data"):
            Demo(tmp_path / "out", wide).run()
    assert not (tmp_path / "out").exists()

    class Batches:
        def embed(self, prompts):
            return prompts

    assert [drawn_prompts(Batches(), kind, 2, 0, frames=5).real.shape[1] for kind in ("image", "video")] == [
        1,
        5,
    ]


def test_measure_gives_the_mean_and_each_run(run, tmp_path, monkeypatch):
    other = tmp_path / "other"  # of another seed, so that it is judged on other scenes and noise
    shutil.copytree(run[0], other, ignore=shutil.ignore_patterns("data", "latents", "states", "measured-*"))
    state = json.loads((other / "state.json").read_text(encoding="utf-8"))
    state["settings"]["seed"] += 1
    (other / "state.json").write_text(json.dumps(state), encoding="utf-8")
    result = measure_runs([run[0], other], 4, tmp_path / "new" / "figures.json")
    assert json.loads((tmp_path / "new" / "figures.json").read_text(encoding="utf-8")) == result
    for name in ("columns", "image_columns"):
        assert tuple(result[name]) == ALL_COLUMNS and len(result[f"{name}_by_run"]) == 2
        for column in ALL_COLUMNS:
            each = [rows[column]["fd"] for rows in result[f"{name}_by_run"]]
            assert (
                result[name][column]["fd"] == pytest.approx(np.mean(each), abs=1e-4)
                and result[name][column]["samples"] == 4
            )
        assert result[f"{name}_by_run"][0]["apt_1"]["fd"] != result[f"{name}_by_run"][1]["apt_1"]["fd"]
        first = result[f"{name}_criteria"][0]
        assert first["runs"] == 2 and first["ratios"] == pytest.approx(
            [rows["apt_1"]["fd"] / rows["distilled_1"]["fd"] for rows in result[f"{name}_by_run"]], abs=1e-4
        )

    # what has been measured is not measured again
    monkeypatch.setattr("trainer.proof.measure.evaluate", None)
    assert measure_runs([run[0], other], 4) == result
    (other / "apt-tiny.safetensors").write_bytes((other / "apt-image.safetensors").read_bytes())
    with pytest.raises(TypeError):  # but a file that has changed is
        measure_runs([other], 4)


def test_measure_in_8_bits_changes_the_apt_model_alone(run):
    plain, eight = (measure_runs([run[0]], 4, fp8=fp8)["columns"] for fp8 in (False, True))
    assert [column for column in COLUMNS if plain[column] != eight[column]] == ["apt_1", "apt_2"]


def test_measure_names_an_unfinished_run_before_it_measures_any(run, tmp_path, monkeypatch):
    out = tmp_path / "unfinished"
    out.mkdir()
    shutil.copy(run[0] / "state.json", out)
    monkeypatch.setattr("trainer.proof.measure.evaluate", None)
    with pytest.raises(
        AptError, match="unfinished has no distilled.safetensors; let the demo finish there first"
    ):
        measure_runs([run[0], out], 4)
    (out / "state.json").write_text('{"settings": {"data": null, "preset": {}}}')
    with pytest.raises(AptError, match="holds no run of the demo"):
        measure_runs([out], 4)


def test_drawing_again_changes_nothing(tmp_path):
    """The same seed gives the same files to the byte, and a file that is there keeps its age, by which its
    latents are known.
    """
    data = load_preset("mini", ["images=3", "clips=2"], ("data",)).data
    for name in ("one", "other"):
        draw_files(tmp_path / name, data, 5, lambda *_: None)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "other")
    )
    assert one == other and len(one) == 10
    ages = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    (tmp_path / "one" / "clip-00001.mp4").write_bytes(b"half")
    draw_files(tmp_path / "one", data, 5, lambda *_: None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == one
    assert [
        path.name for path in (tmp_path / "one").iterdir() if path.stat().st_mtime_ns != ages[path.name]
    ] == ["clip-00001.mp4"]
