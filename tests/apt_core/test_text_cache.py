"""Text embeddings on disk: what is kept, whose it is, and what becomes of damage."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from apt_core.engine.text_cache import TextCache, encoder_fingerprint
from apt_core.errors import AptError
from apt_core.loading.sources import SHIPPED
from apt_core.loading.text_files import read_text_encoder


class Encoder:
    """Embeds a text as a function of its words, and counts."""

    def __init__(self, dtype=torch.float32):
        self.asked, self.dtype = [], dtype

    def __call__(self, texts):
        self.asked.append(texts)
        return [torch.linspace(0, len(text), 3 * len(text)).reshape(-1, 3).to(self.dtype) for text in texts]


def refuse(texts):
    raise AssertionError(f"the encoder was asked for {texts}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_encoded_once(tmp_path, dtype):
    cache, encoder = TextCache(tmp_path, "e"), Encoder(dtype)
    first = cache.get(["red", "blue", "red"], encoder)
    assert encoder.asked == [["red", "blue"]] and first[0] is first[2]
    again = TextCache(tmp_path, "e").get([" red\n", "blue"], refuse)  # white space is nothing to the encoder
    assert all(
        torch.equal(a, b.float()) and a.dtype == torch.float32
        for a, b in zip(again, Encoder(dtype)(["red", "blue"]))
    )
    assert cache.get(["blue", "green"], encoder)[1].shape == (5, 3) and encoder.asked[1] == ["green"]


def test_another_encoder_has_other_embeddings(tmp_path):
    TextCache(tmp_path, "e").get(["red"], Encoder())
    other = Encoder()
    TextCache(tmp_path, "f").get(["red"], other)
    assert other.asked == [["red"]]


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "foreign"])
def test_damage_is_written_again(tmp_path, damage):
    cache = TextCache(tmp_path, "e")
    right = cache.get(["red"], Encoder())[0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "flipped": bytes(flipped),
            "foreign": b"PK\x03\x04 not ours",
        }[damage]
    )
    encoder = Encoder()
    assert torch.equal(cache.get(["red"], encoder)[0], right) and encoder.asked == [["red"]]
    assert path.read_bytes() == whole
    cache.get(["red"], refuse)


def test_the_folder_stays_small(tmp_path):
    size = sum(path.stat().st_size for path in [*_one(tmp_path / "one").iterdir()])
    cache = TextCache(tmp_path / "many", "e", limit=3 * size)
    for i in range(6):
        cache.get([f"re{i}"], Encoder())
        for path in (tmp_path / "many").iterdir():  # time passes
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
        cache.get(["re0"], refuse)  # in use, so it stays
    assert len(list((tmp_path / "many").iterdir())) == 3
    cache.get(["re0", "re4", "re5"], refuse)
    cache.clear()
    assert not list((tmp_path / "many").iterdir())


def _one(folder):
    TextCache(folder, "e").get(["red"], Encoder())
    return folder


def test_many_writers_at_once(tmp_path):
    def work(_):
        return TextCache(tmp_path, "e").get(["red", "blue"], Encoder())

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(32)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
    assert len(list(tmp_path.iterdir())) == 2  # nothing half done is left
    TextCache(tmp_path, "e").get(["red", "blue"], refuse)


def test_a_place_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TextCache(tmp_path / "file" / "cache", "e")
    assert cache.get(["red"], Encoder())[0].shape == (3, 3)


def test_fingerprint(tmp_path):
    facts = read_text_encoder(SHIPPED["text_encoder"])
    assert facts.width == 96
    copy, changed = tmp_path / "copy.safetensors", tmp_path / "changed.safetensors"
    data = bytearray(SHIPPED["text_encoder"].read_bytes())
    copy.write_bytes(data)
    data[-1] ^= 1
    changed.write_bytes(data)
    mine, same, other = (
        encoder_fingerprint(read_text_encoder(path)) for path in (SHIPPED["text_encoder"], copy, changed)
    )
    assert mine == same != other
    with pytest.raises(AptError, match="tokenizer .* holds no spiece.model"):
        read_text_encoder(SHIPPED["text_encoder"], tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"another tokenizer")
    assert encoder_fingerprint(read_text_encoder(copy, tmp_path)) != mine
