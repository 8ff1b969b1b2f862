"""Writes public_shapes.json: names and shapes of files that people use, from the model definitions alone, no
weights. `python tests/apt_core/write_public_shapes.py`

Sources: diffusers' AutoencoderKLWan and transformers' UMT5 and T5; width 24 of LightVAE
from how LightX2V builds it; of taew2_2_super, whose definition is not public in text, widths, kernels and
PixelShuffle as stated of it, on TAEHV's places; Wan's own names from wan/modules/t5.py.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel
from vae_configs import RELEASED_22

from apt_core.files import keys
from apt_core.files.text_keys import BLOCK, TOP
from apt_core.models.text import TIED_KEY
from apt_core.models.tiny_decoder import TinyDecoder

PLACE = Path(__file__).with_name("public_shapes.json")
XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SUPER = 512, 256, 128, 64


def shapes(model) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items() if key != TIED_KEY}


def vae(version: str, **config) -> dict[str, list[int]]:
    found = shapes(AutoencoderKLWan(**config))
    return {keys.vae_to_official(key, version): shape for key, shape in found.items()}


def wan_text(found: dict[str, list[int]]) -> dict[str, list[int]]:
    top, block = ({value: key for key, value in names.items()} for names in (TOP, BLOCK))
    out = {}
    for key, shape in found.items():
        if key in top:
            out[top[key]] = shape
            continue
        _, _, number, rest = key.split(".", 3)
        module, _, leaf = rest.rpartition(".")
        out[f"blocks.{number}.{block[module]}.{leaf}"] = shape
    return out


def tiny_super() -> dict[str, list[int]]:
    out = {"decoder.1.weight": [SUPER[0], 48, 3, 3], "decoder.1.bias": [SUPER[0]]}
    for stage, width in enumerate(SUPER[:3]):
        out[f"decoder.{3 + 6 * stage}.conv.0.weight"] = [width, 1, 7, 7]
        out[f"decoder.{8 + 6 * stage}.weight"] = [4 * SUPER[stage + 1], width, 3, 3]
    return out | {"decoder.22.weight": [12, SUPER[3], 3, 3], "decoder.22.bias": [12]}


def all_shapes() -> dict[str, dict[str, list[int]]]:
    with torch.device("meta"):
        umt5 = shapes(UMT5EncoderModel(UMT5Config(**XXL, feed_forward_proj="gated-gelu")))
        t5 = T5Config(**XXL | {"vocab_size": 32128}, feed_forward_proj="gated-gelu")
        return {
            "wan_2.1_vae": vae("2.1"),
            "wan2.2_vae": vae("2.2", **RELEASED_22),
            "lightvaew2_1": vae("2.1", base_dim=24),
            "wan_2.1_vae_wider_decoder": vae("2.1", decoder_base_dim=128),
            "taew2_1": shapes(TinyDecoder(16)),
            "taew2_2": shapes(TinyDecoder(48)),
            "taew2_2_super": tiny_super(),
            "umt5_xxl_fp16": umt5,
            "umt5-xxl-enc-bf16": wan_text(umt5),
            "t5xxl_fp16": shapes(T5EncoderModel(t5)),
        }


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in all_shapes().items())
    PLACE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
