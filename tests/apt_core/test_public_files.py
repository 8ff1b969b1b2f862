"""Files that people use, by the names and shapes of their tensors: what `inspect` says of each, and what a
pipeline's header checks do with it. The files are sparse: a header of the real size, and no weights.
"""

import json
from pathlib import Path

import pytest
import write_public_shapes

from apt_core.errors import AptError
from apt_core.loading.sources import read_text_source, read_tiny_source, read_vae_source
from apt_core.models.text import TOKENIZER_KEY
from trainer.checkpoints.inspect import inspect

SHAPES = json.loads(write_public_shapes.PLACE.read_text(encoding="utf-8"))
V21, V22 = "yes, as the vae of Wan 2.1 models", "yes, as the vae of Wan 2.2 models"
TEXT = "yes, as text_encoder of width 4096; needs tokenizer=PATH"
TINY = "yes, as tiny_decoder, which is approximate, of Wan {} models' latents"
LOADS = {
    "wan_2.1_vae": ("Wan VAE, official keys, version 2.1", V21),
    "wan2.2_vae": ("Wan VAE, official keys, version 2.2", V22),
    "lightvaew2_1": ("Wan VAE, official keys, version 2.1", V21),
    "wan_2.1_vae_wider_decoder": ("Wan VAE, official keys, version 2.1", V21),
    "taew2_1": ("tiny decoder", TINY.format("2.1")),
    "taew2_2": ("tiny decoder", TINY.format("2.2")),
    "umt5_xxl_fp16": ("UMT5 text encoder", TEXT),
    "umt5-xxl-enc-bf16": ("UMT5 text encoder", TEXT),
}
REFUSED = {
    "taew2_2_super": (
        "tiny decoder",
        "is taew2_2_super (width 512, 7x7 depthwise convolutions), and only the layers",
    ),
    "t5xxl_fp16": ("T5 text encoder", "is a T5 (its relative attention bias is in block 0 only)"),
}


def sparse(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file of fp16 zeros that takes no room."""
    place, entries = 0, {}
    for key, shape in shapes.items():
        end = place + 2
        for n in shape:
            end = place + (end - place) * n
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return path


@pytest.fixture(params=SHAPES)
def public(request, tmp_path) -> tuple[str, Path]:
    return request.param, sparse(tmp_path / f"{request.param}.safetensors", SHAPES[request.param])


def open_part(name: str, path: Path):
    if "vae" in name:
        return read_vae_source(path)
    if "tae" in name:
        return read_tiny_source(path)
    (path.parent / "spiece.model").write_bytes(b"")
    return read_text_source(path, path.parent)


def test_inspect_and_a_pipeline_agree_on_it(public):
    name, path = public
    facts = inspect(path)
    if name in REFUSED:
        what, sentence = REFUSED[name]
        with pytest.raises(AptError) as caught:
            open_part(name, path)
        assert sentence in str(caught.value) and facts["loads"] == f"no: {caught.value}"
    else:
        what, loads = LOADS[name]
        assert facts["loads"] == loads
        source = open_part(name, path)
        if "2_2" in name or "2.2" in name:
            assert (source.channels, source.stride) == (48, (4, 16, 16))
        elif "w2_1" in name or "2.1" in name:
            assert (source.channels, source.stride) == (16, (4, 8, 8))
        else:
            assert source.facts.width == 4096 and source.facts.parameters > 5e9
    assert facts["what"] == what


def test_the_list_is_what_the_definitions_give():
    assert write_public_shapes.all_shapes() == SHAPES and TOKENIZER_KEY not in SHAPES["umt5_xxl_fp16"]
    assert SHAPES.keys() == LOADS.keys() | REFUSED.keys()
