"""Weight files whose header was harmed: they are read right, or refused in one sentence, and nothing of their
size is believed.
"""

import json
import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apt_core.errors import AptError, readable
from apt_core.files.tensorfile import read_header, read_tensors, write_tensors
from apt_core.loading.checkpoint import load_transformer, save_generator
from apt_core.loading.sources import read_sources
from apt_core.models.vae import load_vae
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.trained_models import open_generator
from trainer.mini import VAE

GOOD = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(2)}


@pytest.fixture
def file(tmp_path) -> Path:
    write_tensors(tmp_path / "good.safetensors", GOOD, {"apt": '{"format": 1, "kind": "base"}', "x": "y"})
    return tmp_path / "good.safetensors"


def with_header(path: Path, text: str | bytes) -> Path:
    """The same tensors under another header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return path


def header_of(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda h: h["c"].update(data_offsets=[0, 8]), "overlaps"),
        (lambda h: h.pop("c") and None, "leaves a gap"),
        (lambda h: h["a"].update(shape=[3, 3]), "another size"),
        (lambda h: h["a"].update(shape=[-2, -3]), "no shape"),
        (lambda h: h["a"].update(shape=[True, 6]), "no shape"),
        (lambda h: h["a"].update(shape=6), "no shape"),
        (lambda h: h["a"].update(dtype=["F32"]), "unknown kind"),
        (lambda h: h["a"].update(dtype="F33"), "unknown kind"),
        (lambda h: h["a"].update(data_offsets=[0.0, 24.0]), "no shape"),
        (lambda h: h["a"].update(data_offsets=[24, 0]), "another size"),
        (lambda h: h.update({"a\x00": h.pop("a")}), "control characters"),
        (lambda h: h["__metadata__"].update(native=3), "not all text"),
        (lambda h: h.update(__metadata__=[]), "broken"),
        (lambda h: h.update(a=None), "broken"),
    ],
)
def test_a_header_that_cannot_be(change, word, file):
    header = header_of(file)
    change(header)
    with pytest.raises(AptError, match=word):
        read_header(with_header(file, json.dumps(header)))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": '
        '[2], "data_offsets": [0, 8]}}',
        "{" + '"a":{' * 100_000 + "}" * 100_001,
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        b'{"\xff\xfe": 1}',
    ],
)
def test_a_header_that_is_hardly_json(text, file):
    with pytest.raises(AptError, match="broken safetensors header") as caught:
        read_header(with_header(file, text))
    assert len(str(caught.value)) < 1100


def test_a_good_file_is_read_to_the_last_number(file):
    tensors, header = read_tensors(file)
    assert (
        all(torch.equal(tensors[key], value) for key, value in GOOD.items()) and header.metadata["x"] == "y"
    )


def test_mutations_are_read_right_or_refused(file, tmp_path):
    """A few hundred harmed headers: what is read has the values of the good file."""
    rng, good = random.Random(5), file.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    read = 0
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(length)
            raw[place] = rng.choice(
                [rng.randrange(256), 0x30 + rng.randrange(10), ord("["), ord('"'), ord("{"), 0]
            )
        file.write_bytes(raw)
        try:
            tensors, _ = read_tensors(file)
        except AptError as error:
            assert str(error).isprintable() and len(str(error)) < 1100
            continue
        read += 1
        stored = {value.numpy().tobytes() for value in GOOD.values()}
        assert b"".join(sorted(value.numpy().tobytes() for value in tensors.values())) == b"".join(
            sorted(stored)
        )
    assert read < 200  # or the harm was none


def test_equal_weights_give_equal_files(tmp_path):
    strings = {name: "x" * number for number, name in enumerate("zyxwvuts")}
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in files:
        write_tensors(path, GOOD, strings)
    assert len({path.read_bytes() for path in files}) == 1
    assert list(read_header(files[0]).metadata) == sorted([*strings, "format"])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AptError, match="is not a file"):
        read_header(tmp_path / "pipe.safetensors")


def test_counts_are_compared_before_anything_is_built(wan_file, tmp_path):
    """A billion layers, of a config and of names, in no time and no memory."""
    model = load_transformer(wan_file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = tmp_path / "folder"
    folder.mkdir()
    config = dict(model.config) | {"_class_name": "WanTransformer3DModel", "num_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(AptError, match="num_layers 1000000000, but the file holds"):
        load_transformer(folder)
    names = dict(read_tensors(wan_file)[0]) | {
        f"blocks.{number}.x": torch.zeros(1) for number in range(2, 3000)
    }
    save_file(names, tmp_path / "names.safetensors", metadata=dict(read_header(wan_file).metadata))
    with pytest.raises(AptError, match="names 3000 blocks, but only the first ones have tensors"):
        load_transformer(tmp_path / "names.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.fixture(scope="module")
def wan_file(tmp_path_factory) -> Path:
    from layouts import tiny_wan

    path, model = tmp_path_factory.mktemp("wan") / "wan.safetensors", tiny_wan(0)
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(("blocks.2.", "blocks.3."))
    }
    save_generator(path, state, dict(model.config) | {"num_layers": 2}, {"kind": "base"})
    return path


DAMAGE = [
    "",
    "{",
    "[]",
    "null",
    "[" * 100_000,
    '{"base": 3}',
    '{"base": "x", "metadata": [], "lora": null}',
    "9" * 5000,
    "\ufeff{}",
    '{"a": NaN}',
]


@pytest.mark.parametrize("name", ["about.json", "step-000001/run.json"])
def test_damaged_json_beside_a_state_is_one_sentence(name, trained, tmp_path):
    states = tmp_path / "states"
    shutil.copytree(trained / "states", states)
    good = (states / name).read_bytes()
    for text in DAMAGE:
        (states / name).write_text(text, encoding="utf-8")
        with pytest.raises(AptError, match="damaged|not a whole"):
            open_generator(states / "step-000001")
        if name.endswith("run.json"):
            assert inspect(states / "step-000001")["loads"].startswith("no: ")
    (states / name).write_bytes(good)
    assert open_generator(states / "step-000001").metadata["updates"] == 1


@pytest.mark.parametrize(
    "text", [*DAMAGE[:5], DAMAGE[7], '{"format": 99, "kind": "generator"}', '{"format": 1, "kind": 3}']
)
def test_damaged_json_in_a_diffusers_folder_is_one_sentence(text, wan_file, tmp_path):
    from apt_core.loading.checkpoint import save_diffusers_folder
    from apt_core.loading.sources import read_transformer

    save_diffusers_folder(tmp_path / "out", load_transformer(wan_file), {})
    (tmp_path / "out" / "apt.json").write_text(text, encoding="utf-8")
    for read in (read_transformer, open_generator):
        with pytest.raises(AptError):
            read(tmp_path / "out")


def test_messages_can_be_shown():
    """What a file or a person wrote stands in them: on one line, without what moves a terminal's cursor, and
    not by the megabyte.
    """
    message = str(AptError(f"the key {'k' * 10_000}\x1b[2J\n\x00é is not known"))
    assert (
        message.isprintable() and len(message) < 1100 and message.endswith("is not known") and "é" in message
    )
    assert readable("a\tb") == "a\\tb"


def test_a_shape_of_huge_numbers_is_not_multiplied(file):
    header = header_of(file)
    for shape in ([10**4000] * 1500, [1] * 17, [2**63, 0]):
        header["a"]["shape"] = shape
        with pytest.raises(AptError, match="no shape"):
            read_header(with_header(file, json.dumps(header)))


def test_a_path_with_a_nul_is_one_sentence():
    with pytest.raises(AptError, match="cannot be read"):
        read_header("a\0b.safetensors")


@pytest.mark.parametrize(
    "change", [{"num_res_blocks": 10**7}, {"num_res_blocks": "2"}, {"dim_mult": [1] * 10**5}, {"dim_mult": 3}]
)
def test_a_vae_that_its_file_cannot_fill_is_not_built(change, tmp_path):
    vae = load_vae(VAE)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")} | {
        "_class_name": "AutoencoderKLWan"
    }
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    save_file(vae.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(AptError):
        load_vae(tmp_path)


def test_what_makes_other_channels_is_refused_before_a_weight_is_read():
    """A model for images or control videos beside the noise, and VAEs whose pixels are not red, green and
    blue.
    """
    whole = read_sources("mini")
    other = replace(
        whole.transformer, config=dict(whole.transformer.config) | {"in_channels": 36, "out_channels": 16}
    )
    with pytest.raises(
        AptError, match="takes 36 channels and makes 16: it wants an image or a control video"
    ):
        replace(whole, transformer=other)
