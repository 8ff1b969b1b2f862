"""What goes into shards comes out, whatever happened in between; and every sample is drawn once per epoch by
any number of processes.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from apt_core.errors import AptError
from trainer.data import shards
from trainer.data.shards import Sample, ShardDataset, ShardWriter

FACTS = {"vae": {"stride": [4, 8, 8], "channels": 2}, "text": {"dim": 5, "length": 7}, "fps": 8}
SETTINGS = {"vae": "abc", "height": 16}


def entry(number: int, kind: str = "video") -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """A sample whose values are functions of its number; text of 1 to 4 tokens."""
    gen = torch.Generator().manual_seed(number)
    shape = (2, 1 if kind == "image" else 3, 2, 4)
    sample = Sample(f"{number:03d}.{kind}", kind, f"caption {number}", f"source {number}")
    return sample, torch.randn(shape, generator=gen), torch.randn(1 + number % 4, 5, generator=gen)


def write(folder, entries, **options) -> list[tuple]:
    with ShardWriter(folder, SETTINGS, **options) as writer:
        for each in entries:
            if each[0].key not in writer.done:
                writer.add(*each)
        writer.finish([each[0].key for each in entries], FACTS)
    return entries


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [entry(i, "image" if i % 3 == 0 else "video") for i in range(12)])
    return tmp_path


def test_samples_come_back_as_they_were(folder):
    images, videos = ShardDataset(folder, "image"), ShardDataset(folder, "video")
    assert (len(images), len(videos)) == (4, 8)
    assert (videos.fps, videos.text_length, videos.text_dim, videos.vae) == (8, 7, 5, FACTS["vae"])
    assert videos.buckets == {(2, 3, 2, 4): list(range(8))}
    for data, kind, numbers in (
        (images, "image", range(0, 12, 3)),
        (videos, "video", [i for i in range(12) if i % 3]),
    ):
        for i, number in enumerate(numbers):
            sample, latent, text = entry(number, kind)
            got = data.get(i)
            assert torch.equal(got[0], latent) and torch.equal(got[1], text) and got[2] == sample.caption
            assert (data.samples[i].id, data.samples[i].tokens) == (sample.id, len(text))


def test_a_batch_is_padded_with_zeros(folder):
    data = ShardDataset(folder, "video")
    latents, text, captions = data.batch([5, 0, 5])
    assert (
        latents.shape == (3, 2, 3, 2, 4)
        and text.shape == (3, 7, 5)
        and captions[0] == captions[2] == "caption 8"
    )
    for row, i in enumerate([5, 0, 5]):
        latent, embedding, _ = data.get(i)
        assert torch.equal(latents[row], latent) and torch.equal(text[row, : len(embedding)], embedding)
        assert text[row, len(embedding) :].eq(0).all()
    latents.zero_()
    data.get(5)[0].zero_()
    assert data.get(5)[0].abs().sum() > 0  # what is handed out is a copy


def test_bf16_shards_give_fp32(tmp_path):
    write(tmp_path, [entry(1), entry(2)], dtype=torch.bfloat16)
    latent, text, _ = ShardDataset(tmp_path, "video").get(1)
    assert latent.dtype == text.dtype == torch.float32
    assert torch.equal(latent, entry(2)[1].bfloat16().float())


def test_several_shards_and_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.shards.SHARD_SAMPLES", 3)
    entries = [entry(i) for i in range(8)]
    odd, _, text = entry(8)
    entries.append((odd, torch.ones(2, 3, 4, 2), text))
    write(tmp_path, entries)
    assert sorted(files(tmp_path)) == ["index.json"] + [f"shard-{i:05d}.safetensors" for i in range(4)]
    data = ShardDataset(tmp_path, "video")
    assert data.buckets == {(2, 3, 2, 4): list(range(8)), (2, 3, 4, 2): [8]}
    assert all(torch.equal(data.get(i)[0], entries[i][1]) for i in range(9))
    with pytest.raises(AptError, match="different shapes"):
        data.batch([0, 8])


def test_an_interrupted_writer_keeps_what_it_had_and_goes_on(tmp_path):
    entries = [entry(i) for i in range(6)]
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, SETTINGS) as writer:
        for each in entries[:4]:
            writer.add(*each)
        raise KeyboardInterrupt
    before = files(tmp_path)
    assert list(before) == ["shard-00000.safetensors"]
    again = ShardWriter(tmp_path, SETTINGS)
    assert set(again.done) == {each[0].key for each in entries[:4]}

    changed = entry(2)[0], torch.full((2, 3, 2, 4), 7.0), entry(2)[2]
    changed = (Sample(changed[0].id, "video", changed[0].caption, "newer"), *changed[1:])
    write(tmp_path, [*entries[:2], changed, *entries[3:]])
    data = ShardDataset(tmp_path, "video")
    assert [sample.id for sample in data.samples] == [each[0].id for each in entries]
    assert torch.equal(data.get(2)[0], changed[1]) and torch.equal(data.get(3)[0], entries[3][1])
    assert files(tmp_path)["shard-00000.safetensors"] == before["shard-00000.safetensors"]


def test_other_settings_are_refused_and_change_nothing(folder):
    before = files(folder)
    for settings, options, says in (
        ({**SETTINGS, "height": 32}, {}, "height 16 instead of 32"),
        (SETTINGS, {"dtype": torch.bfloat16}, "dtype float32 instead of bfloat16"),
    ):
        with pytest.raises(AptError, match=f"{says}: give another folder"):
            ShardWriter(folder, settings, **options)
    assert files(folder) == before


def test_damaged_shards_are_named_and_made_anew(folder):
    whole = files(folder)
    shard = ShardDataset(folder, "video").samples[0].shard
    path = folder / shard
    for content in (whole[shard][:-100], whole[shard][:50], b"", b"junk" * 100):
        path.write_bytes(content)
        with pytest.raises(AptError) as error:
            ShardDataset(folder, "video")
        assert (
            str(path) in str(error.value)
            and "run precompute again." in str(error.value)
            and "\n" not in str(error.value)
        )
        assert len(ShardDataset(folder, "image")) == 4
    path.unlink()
    with pytest.raises(AptError, match="does not exist: run precompute again"):
        ShardDataset(folder, "video")
    write(folder, [entry(i, "image" if i % 3 == 0 else "video") for i in range(12)])
    assert torch.equal(ShardDataset(folder, "video").get(7)[0], entry(11)[1])


def test_damaged_indices_are_named(folder):
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for text in (
        "{",
        "",
        "[]",
        json.dumps(index | {"version": 99}),
        json.dumps({k: v for k, v in index.items() if k != "samples"}),
    ):
        path.write_text(text)
        with pytest.raises(AptError, match="index.json.* run precompute again"):
            ShardDataset(folder, "video")
    for change in ({"row": 99}, {"bucket": [2, 3, 2, 5]}, {"tokens": 8}):
        path.write_text(json.dumps(index | {"samples": [s | change for s in index["samples"]]}))
        with pytest.raises(AptError, match="does not hold what index.json says"):
            ShardDataset(folder, "video")
    path.write_text(json.dumps(index | {"samples": [s | {"tokens": 6} for s in index["samples"]]}))
    with pytest.raises(AptError, match="does not hold what index.json says"):
        ShardDataset(folder, "video").get(0)
    path.unlink()
    with pytest.raises(AptError, match="run precompute on a folder"):
        ShardDataset(folder, "video")


@pytest.mark.parametrize("says_so", [True, False])
def test_shards_of_another_version_are_neither_read_nor_added_to(says_so, folder, monkeypatch):
    """One sentence with both versions and what would do, and no file is touched; shards from before they said
    their version are of the first, and go on.
    """
    if not says_so:
        for path in folder.glob("shard-*"):
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                strings = {k: v for k, v in file.metadata().items() if k != "version"}
            save_file(tensors, path, metadata=strings)
    before = files(folder)
    with ShardWriter(folder, SETTINGS) as writer:
        assert len(writer.done) == 12
    monkeypatch.setattr(shards, "VERSION", 2)
    with pytest.raises(AptError) as error:
        ShardWriter(folder, SETTINGS)
    assert str(error.value) == (
        f"{folder} holds shards of apt-shards version 1, but this program writes version 2: "
        "give another folder, or delete it to start over."
    )
    with pytest.raises(AptError) as error:
        ShardDataset(folder, "video")
    assert str(error.value) == (
        f"{folder / 'index.json'} is of apt-shards version 1, but this program reads version 2: "
        "run precompute again into another folder."
    )
    assert files(folder) == before
