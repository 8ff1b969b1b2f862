"""From files to shards: values arrive in place, everything is checked first, and a stopped run goes on where
it was.
"""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from apt_core.errors import AptError, NotFinite
from apt_core.files.media_write import write_image, write_video
from trainer.data.precompute import fingerprint, precompute
from trainer.data.prompts import Prompts
from trainer.data.shards import ShardDataset
from trainer.jobs.tell import tell_precomputed
from trainer.mini import ASSETS, VAE

SIZE = {"height": 32, "width": 32, "frames": 5, "fps": 8}


class Vae(torch.nn.Module):
    """Latents are the means of 4x8x8 blocks (the first frame alone), plus `weight`. Stops at call number
    `stop`.
    """

    def __init__(self, weight: float = 0.0, stop: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))
        self.config = SimpleNamespace(
            scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 3, latents_std=[1.0] * 3
        )
        self.dtype, self.seen, self.calls, self.stop = torch.float32, 0, 0, stop

    def encode(self, video):
        self.calls += 1
        if self.calls == self.stop:
            raise RuntimeError("out of memory")
        self.seen += len(video)
        pool = torch.nn.functional.avg_pool3d
        parts = [pool(video[:, :, :1], (1, 8, 8))] + (
            [pool(video[:, :, 1:], (4, 8, 8))] if video.shape[2] > 1 else []
        )
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.cat(parts, 2) + self.weight))


class Text:
    """One token a word; its embedding is the word's length."""

    text_length, dim = 6, 4

    def __init__(self):
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.model.weight), torch.nn.init.zeros_(self.model.bias)

    def tokenize(self, texts, truncate=False):
        return [
            [len(word) for word in text.split()][: self.text_length if truncate else None] for text in texts
        ]

    def encode(self, texts, truncate=False):
        return [
            torch.tensor(row, dtype=torch.float32)[:, None].expand(-1, self.dim)
            for row in self.tokenize(texts, truncate)
        ]


def clip(number: int, frames: int = 5) -> np.ndarray:
    """Grey that brightens from frame to frame, of a brightness that tells the number."""
    return np.stack([np.full((32, 32, 3), 10 * number + 20 * (k > 0) + 5, np.uint8) for k in range(frames)])


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for i in range(7):
        write_video(folder / f"clip{i}.mp4", clip(i), 8, crf=4, pixel_format="yuv444p")
        (folder / f"clip{i}.txt").write_text("a b" + " word" * (i % 3))
    for i in range(3):
        write_image(folder / f"image{i}.png", np.full((40, 50, 3), 60 * i, np.uint8))
        (folder / f"image{i}.txt").write_text(f"image {i}")
    return folder


def tree(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def run(data, out, vae=None, **options):
    return precompute(data, out, vae or Vae(), Text(), **{**SIZE, **options})


def refused(*parts, kind: type[AptError] = AptError, **options) -> str:
    with pytest.raises(kind) as error:
        run(**options)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for part in parts:
        assert part in text, text
    return text


def test_values_arrive_in_order(data, tmp_path):
    steps = []
    report = run(data, tmp_path / "out", batch=4, progress=lambda done, total: steps.append((done, total)))
    assert (
        report.samples == {"image": 3, "video": 7}
        and report.encoded == 10
        and report.skipped == []
        and report.clips_per_second > 0
    )
    assert steps[0] == (0, 10) and steps[-1] == (10, 10) and steps == sorted(steps)
    videos, images = (ShardDataset(tmp_path / "out", kind) for kind in ("video", "image"))
    assert (videos.fps, videos.text_dim, videos.text_length, videos.vae) == (
        8,
        4,
        6,
        {"stride": [4, 8, 8], "channels": 3},
    )
    latents, text, captions = videos.batch(list(range(7)))
    assert latents.shape == (7, 3, 2, 4, 4)
    for i in range(7):
        for frame, grey in ((0, 10 * i + 5), (1, 10 * i + 25)):
            assert (latents[i, :, frame] - (grey / 127.5 - 1)).abs().max() < 0.02
        words = captions[i].split()
        assert len(words) == 2 + i % 3 and text[i, :, 0].tolist() == [len(word) for word in words] + [0] * (
            6 - len(words)
        )
    latents = images.batch([0, 1, 2])[0]
    assert (
        latents.shape == (3, 3, 1, 4, 4)
        and (latents.mean((1, 2, 3, 4)) - torch.tensor([0, 60, 120]) / 127.5 + 1).abs().max() < 1e-5
    )
    assert json.loads((tmp_path / "out" / "skipped.json").read_text(encoding="utf-8")) == []


def test_kinds_and_image_frames(data, tmp_path):
    vae = Vae()
    assert (
        run(data, tmp_path / "out", vae, kinds=("image",), image_frames=5).samples == {"image": 3, "video": 0}
        and vae.seen == 3
    )
    assert ShardDataset(tmp_path / "out", "image").samples[0].bucket == (3, 2, 4, 4)
    assert len(ShardDataset(tmp_path / "out", "video")) == 0


def test_bad_input_is_refused_before_anything_is_encoded(data, tmp_path):
    out, vae = tmp_path / "out", Vae()
    (data / "clip1.mp4").write_bytes((data / "clip1.mp4").read_bytes()[:900])
    (data / "clip3.txt").write_text("far too many words for this text encoder")
    write_video(data / "clip5.mp4", clip(5, 3), 8)
    (data / "image2.txt").unlink()
    refused("image2.png has no caption", "3 more cannot be used", "--skip-bad", data=data, out=out, vae=vae)
    assert vae.calls == 0 and not out.exists()

    report = run(data, out, vae, skip_bad=True)
    reasons = {
        entry["file"]: entry["reason"]
        for entry in json.loads((out / "skipped.json").read_text(encoding="utf-8"))
    }
    assert report.samples == {"image": 2, "video": 4} and len(report.skipped) == 4
    assert set(reasons) == {"clip1.mp4", "clip3.mp4", "clip5.mp4", "image2.png"}
    assert (
        "clip1.mp4 holds no frame that can be decoded" in reasons["clip1.mp4"]
        and "clip5.mp4 is 0.37 s long, but 0.63 s (5 frames at 8 fps)" in reasons["clip5.mp4"]
    )
    assert "has 8 tokens, but at most 6 fit: shorten it, or give --truncate-captions" in reasons["clip3.mp4"]
    assert [sample.id for sample in ShardDataset(out, "video").samples] == [
        f"clip{i}.mp4" for i in (0, 2, 4, 6)
    ]


def test_long_captions_are_cut_if_asked_to(data, tmp_path):
    (data / "clip3.txt").write_text("far too many words for this text encoder")
    run(data, tmp_path / "out", truncate_captions=True)
    assert ShardDataset(tmp_path / "out", "video").samples[3].tokens == 6


def test_sizes_and_folders_that_cannot_be(data, tmp_path):
    vae = Vae()
    refused(
        "height 40 must be a multiple of 16 (32 or 48)", data=data, out=tmp_path / "out", vae=vae, height=40
    )
    refused("frames 6 must be 4 n + 1 (5 or 9)", data=data, out=tmp_path / "out", vae=vae, frames=6)
    refused("must be above 0", data=data, out=tmp_path / "out", vae=vae, fps=0)
    refused("out of files is a file", data=data, out=_touch(tmp_path / "out of files"), vae=vae)
    refused("cannot be made", data=data, out=tmp_path / "out of files" / "out", vae=vae)
    refused("is not a folder", data=tmp_path / "gone", out=tmp_path / "out", vae=vae)
    for path in data.glob("clip*"):
        path.unlink()
    refused("holds no videos", data=data, out=tmp_path / "out", vae=vae, kinds=("video",))
    for path in data.glob("*.png"):
        path.write_bytes(b"junk")
    refused(
        "holds no captioned image or video",
        "3 cannot be used",
        "image0.png",
        data=data,
        out=tmp_path / "out",
        vae=vae,
        skip_bad=True,
    )
    assert vae.calls == 0 and not (tmp_path / "out").exists()


def _touch(path):
    path.touch()
    return path


def test_a_stopped_run_goes_on(data, tmp_path):
    out, failing = tmp_path / "out", Vae(stop=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(data, out, failing, batch=2)
    before = tree(out)
    assert failing.seen == 5 and "index.json" not in before and len(before) == 2  # 3 images, 2 clips
    again, steps = Vae(), []
    report = run(data, out, again, batch=2, progress=lambda done, total: steps.append(done))
    assert again.seen == report.encoded == 5 and steps[0] == 5 and report.samples == {"image": 3, "video": 7}
    assert all(tree(out)[name] == content for name, content in before.items())

    run(data, tmp_path / "whole", batch=2)
    for kind in ("image", "video"):
        one, two = ShardDataset(out, kind), ShardDataset(tmp_path / "whole", kind)
        everything = list(range(len(two)))
        assert all(torch.equal(a, b) for a, b in zip(one.batch(everything)[:2], two.batch(everything)[:2]))
        assert one.batch(everything)[2] == two.batch(everything)[2] and one.fingerprint == two.fingerprint


def test_a_repeated_run_encodes_what_is_new_or_changed_only(data, tmp_path):
    out, vae = tmp_path / "out", Vae()
    run(data, out)
    (data / "clip1.txt").write_text("new words here")
    write_video(data / "clip2.mp4", clip(9), 8, crf=4, pixel_format="yuv444p")
    write_video(data / "clip9.mp4", clip(8), 8)
    (data / "clip9.txt").write_text("one more")
    (data / "image0.png").unlink()
    (data / "image0.txt").unlink()
    assert run(data, out, vae).samples == {"image": 2, "video": 8} and vae.seen == 3
    videos = ShardDataset(out, "video")
    assert videos.get(1)[2] == "new words here" and videos.samples[7].id == "clip9.mp4"
    assert (videos.get(2)[0][:, 0] - (95 / 127.5 - 1)).abs().max() < 0.02
    assert run(data, out, vae).encoded == 0 and vae.seen == 3


def test_samples_that_leave_the_index_are_counted_and_said(data, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    first = run(data, out)
    assert first.dropped == 0 and run(data, out).dropped == 0
    other.mkdir()
    for name in ("clip0.mp4", "clip0.txt"):
        (other / name).write_bytes((data / name).read_bytes())
    write_video(other / "new.mp4", clip(3), 8)
    (other / "new.txt").write_text("another folder")
    made = run(other, out)
    assert made.samples == {"image": 0, "video": 2}
    assert made.dropped == sum(first.samples.values()) - 1  # clip0.mp4 is there again
    tell_precomputed(made, out)
    said = (
        f"{made.dropped} samples of the earlier index are not in this data, so they are no longer trained on"
    )
    assert said in capsys.readouterr().out
    tell_precomputed(run(other, out), out)
    assert "no longer trained on" not in capsys.readouterr().out


def test_other_models_or_sizes_are_refused_and_change_nothing(data, tmp_path):
    out = tmp_path / "out"
    run(data, out)
    before = tree(out)
    refused("holds shards made with vae", "give another folder", data=data, out=out, vae=Vae(weight=1.0))
    refused("frames 5 instead of 1", data=data, out=out, frames=1)
    with pytest.raises(AptError, match="no caption"):
        (data / "clip0.txt").unlink()
        run(data, out)
    with pytest.raises(RuntimeError):
        (data / "clip0.txt").write_text("changed")
        run(data, out, Vae(stop=1))
    assert tree(out) == before


def test_a_file_that_fails_only_when_decoded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.cuts.shown", lambda *_: 99)
    (data / "clip4.mp4").write_bytes((data / "clip4.mp4").read_bytes()[:900])
    refused("clip4.mp4 holds no frame", "--skip-bad would go on", data=data, out=tmp_path / "out", batch=2)
    report = run(data, tmp_path / "out", skip_bad=True, batch=2)
    assert report.samples == {"image": 3, "video": 6} and [entry.path.name for entry in report.skipped] == [
        "clip4.mp4"
    ]


def test_values_that_are_not_finite_are_refused(data, tmp_path):
    refused(
        "image0.png is encoded to values that are not finite",
        kind=NotFinite,
        data=data,
        out=tmp_path / "out",
        vae=Vae(weight=float("nan")),
    )


def test_fingerprints_tell_models_apart():
    text, other = Text(), Text()
    assert fingerprint(text) == fingerprint(other) and fingerprint(Vae()) == fingerprint(
        Vae()
    ) != fingerprint(Vae(0.1))
    other.tokenize = lambda texts: [[1]]
    assert fingerprint(text) != fingerprint(other)
    shifted = Vae()
    shifted.config.latents_mean = [1.0] * 3
    assert fingerprint(shifted) != fingerprint(Vae())


@pytest.mark.skipif(
    not (VAE).exists() or not (ASSETS / "text_encoder.safetensors").exists(),
    reason="the miniature is not built yet",
)
def test_the_miniatures_own_models(data, tmp_path):
    from apt_core.loading.text_files import load_text_encoder
    from apt_core.models.vae import encode, load_vae

    vae, text = load_vae(VAE), load_text_encoder(ASSETS / "text_encoder.safetensors")
    precompute(data, tmp_path / "out", vae, text, **SIZE)
    videos = ShardDataset(tmp_path / "out", "video")
    latents, padded, captions = videos.batch([2, 6])
    assert (
        padded.shape == (2, text.text_length, text.dim)
        and (padded - text.pad(text.encode(captions), text.text_length)).abs().max() < 1e-4
    )
    pixels = torch.from_numpy(np.stack([clip(2), clip(6)])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    expected = encode(vae, pixels)
    assert latents.shape == expected.shape and (latents - expected).abs().mean() < 0.05
    assert os.listdir(tmp_path / "out") and videos.vae == {"stride": [4, 8, 8], "channels": 16}


class Thread:
    """A World of threads: what precompute asks of its processes."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, board: dict):
        self.rank, self.size, self.main, self._meeting, self._board = rank, size, rank == 0, meeting, board

    def gather(self, value):
        self._board[self.rank] = value
        self._meeting.wait()
        values = [self._board[rank] for rank in range(self.size)]
        self._meeting.wait()
        return values

    def barrier(self):
        self._meeting.wait()


def together(size: int, data, out, **options) -> list:
    meeting, board = threading.Barrier(size, timeout=600), {}
    with ThreadPoolExecutor(size) as pool:
        runs = [
            pool.submit(run, data, out, world=Thread(rank, size, meeting, board), **options)
            for rank in range(size)
        ]
        return [future.result() for future in runs]


def test_several_processes_share_the_work_and_make_the_same_index(data, tmp_path):
    alone = run(data, tmp_path / "alone")
    reports = together(3, data, tmp_path / "three")
    assert reports[0].samples == reports[2].samples == alone.samples and reports[1].encoded == 10
    for kind in ("image", "video"):
        one, many = ShardDataset(tmp_path / "alone", kind), ShardDataset(tmp_path / "three", kind)
        assert [sample.id for sample in one.samples] == [
            sample.id for sample in many.samples
        ] and one.fingerprint == many.fingerprint
        for i in range(len(one)):
            assert torch.equal(one.get(i)[0], many.get(i)[0]) and torch.equal(one.get(i)[1], many.get(i)[1])
    # of rank 0 the names are short
    assert {path.name.split("-")[1] for path in (tmp_path / "three").glob("shard-*-*")} == {
        "001",
        "002",
    }


def test_another_number_of_processes_encodes_nothing_twice(data, tmp_path):
    together(3, data, tmp_path / "out")
    vae = Vae()
    assert run(data, tmp_path / "out", vae).encoded == 0 and vae.seen == 0
    (data / "image9.png").write_bytes((data / "image0.png").read_bytes())
    (data / "image9.txt").write_text("new")
    assert together(2, data, tmp_path / "out")[0].encoded == 1
    assert len(ShardDataset(tmp_path / "out", "image")) == 4


def test_a_bad_file_stops_every_process(data, tmp_path):
    (data / "clip3.mp4").write_bytes(b"no video")
    with pytest.raises(AptError, match="clip3.mp4 cannot be read as a video"):
        together(2, data, tmp_path / "out")
    report = together(2, data, tmp_path / "out", skip_bad=True)[1]
    assert report.samples == {"image": 3, "video": 6} and [bad.path.name for bad in report.skipped] == [
        "clip3.mp4"
    ]


def test_buckets_and_clips_of_long_files(data, tmp_path):
    write_video(data / "long.mp4", clip(8, 12), 8, crf=4, pixel_format="yuv444p")
    (data / "long.txt").write_text("a long one")
    run(data, tmp_path / "out", clips_per_file=3, image_height=48, image_width=32)
    videos, images = (ShardDataset(tmp_path / "out", kind) for kind in ("video", "image"))
    assert [sample.id for sample in videos.samples][-2:] == ["long.mp4", "long.mp4#1"] and len(videos) == 9
    assert set(videos.buckets) == {(3, 2, 4, 4)} and set(images.buckets) == {(3, 1, 6, 4)}
    vae = Vae()
    assert (
        run(data, tmp_path / "out", vae, clips_per_file=3, image_height=48, image_width=32).encoded == 0
        and vae.seen == 0
    )


def test_prompts_are_stored_beside_the_shards(data, tmp_path):
    run(data, tmp_path / "out", prompts=("bad quality", "a b", "bad quality"))
    stored = Prompts(tmp_path / "out")
    assert [row[:, 0].tolist() for row in stored.encode(["a b", "bad quality"])] == [[1, 1], [3, 7]]
    with pytest.raises(AptError, match='the prompt "new" was not encoded'):
        stored.encode(["new"])


def test_a_prompt_that_is_too_long_is_said_before_anything_is_encoded(data, tmp_path):
    vae = Vae()
    with pytest.raises(AptError, match='the caption "a b c d e f g" has 7 tokens, but at most 6 fit'):
        run(data, tmp_path / "out", vae, prompts=("a b", "a b c d e f g"))
    assert vae.seen == 0 and not (tmp_path / "out").exists()


def test_any_name_that_the_file_system_takes(tmp_path):
    """Also as several clips of one file, twice, and in the order of names and numbers."""
    folder = tmp_path / "data"
    names = [
        "a#1.mp4",
        "a#b.mp4",
        "a.mp4#2.mp4",
        "a.mp4",
        "#.mp4",
        "100% of é ü.mp4",
        "a\nb.mp4",
        " a .mp4",
        "-x.mp4",
        "a#10.mp4",
    ]
    for number, name in enumerate(names):
        write_video(folder / name, clip(number, 10), 8, crf=4, pixel_format="yuv444p")
        (folder / name).with_suffix(".txt").write_text(f"number {number}")
    for repeat in range(2):
        report = run(folder, tmp_path / "out", clips_per_file=2)
        assert report.samples["video"] == 2 * len(names) and report.encoded == (
            0 if repeat else 2 * len(names)
        )
    data = ShardDataset(tmp_path / "out", "video")
    captions = [sample.caption for sample in data.samples]
    assert captions == [f"number {names.index(name)}" for name in sorted(names) for _ in range(2)]


def test_a_spoilt_shard_is_noticed_and_mended(data, tmp_path):
    """Zeros, a flipped bit in numbers and in a caption, a file cut off: the training stops before it uses a
    row, and precompute does what the sentence says.
    """
    out = tmp_path / "out"
    run(data, out)
    shard = next(path for path in sorted(out.glob("shard-*.safetensors")) if b"clip0" in path.read_bytes())
    good, whole = shard.read_bytes(), [ShardDataset(out, "video").get(i)[0] for i in range(7)]
    header = int.from_bytes(good[:8], "little") + 8
    harms = {
        "zeros": good[:header] + bytes(len(good) - header),
        "bit": good[:-5] + bytes([good[-5] ^ 4]) + good[-4:],
        "caption": good.replace(b"a b", b"a c", 1),
        "cut": good[:-100],
        "empty": b"",
    }
    for name, harm in harms.items():
        shard.write_bytes(harm)
        with pytest.raises(AptError, match="run precompute again"):
            ShardDataset(out, "video").batch(list(range(7)))
        report = run(data, out)
        assert report.encoded == 7, name
        assert all(torch.equal(ShardDataset(out, "video").get(i)[0], x) for i, x in enumerate(whole)), name


def test_an_index_that_says_other_things_than_were_written_is_damaged(data, tmp_path):
    out = tmp_path / "out"
    run(data, out)
    index = (out / "index.json").read_text(encoding="utf-8")
    for old, new in (
        ('"a b"', '"a c"'),
        ("shard-00000", "../shard-0"),
        ('"row": 0', '"row": -1'),
        ('"kind": "video"', '"kind": "vidEo"'),
        ("[", "[" * 100_000),
    ):
        assert old in index
        (out / "index.json").write_text(index.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(AptError, match="damaged: run precompute again"):
            ShardDataset(out, "video")
    (out / "index.json").write_text(index, encoding="utf-8")
    assert len(ShardDataset(out, "video")) == 7


def test_shards_from_before_digests_open(data, tmp_path):
    from safetensors.torch import load_file, save_file

    from apt_core.files.tensorfile import read_header

    out = tmp_path / "out"
    run(data, out)
    before = [ShardDataset(out, "video").get(i)[0] for i in range(7)]
    for path in out.glob("shard-*.safetensors"):
        strings = {name: value for name, value in read_header(path).metadata.items() if name != "digest"}
        save_file(load_file(path), path, metadata=strings)
    assert (
        all(torch.equal(ShardDataset(out, "video").get(i)[0], x) for i, x in enumerate(before))
        and run(data, out).encoded == 0
    )


def test_what_was_converted_is_said_once_a_file(data, tmp_path, capsys):
    clear = np.full((32, 32, 4), 60, np.uint8)
    clear[:16, :, 3] = 0
    Image.fromarray(clear).save(data / "image1.png")
    report = run(data, tmp_path / "out", clips_per_file=2)
    assert report.converted == {"image1.png": ["transparent parts laid over white"]}
    tell_precomputed(report, tmp_path)
    assert "image1.png: transparent parts laid over white." in capsys.readouterr().out
    assert run(data, tmp_path / "out", clips_per_file=2).converted == {}
