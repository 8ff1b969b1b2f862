"""Load APT Text Encoder: stock CLIP Text Encode with `encoder` of models/text_encoders and with the built-in
one, into `out`.
"""

import json
import os

from comfyui import start

paths, complaints = start()

import torch
from apt_nodes import load_nodes, offer, sentence
from safetensors.torch import save_file

import nodes

apt = load_nodes(paths["pack"])
offer(paths["files"], "text_encoders")
captions = json.loads(paths["captions"])


def load(name: str):
    return apt.APTLoadTextEncoder.execute(name).args[0]


def encode(clip, text: str) -> torch.Tensor:
    ((embeddings, _),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    return embeddings


with torch.inference_mode():
    out = {}
    for name in ("apt_mini_text_encoder", "other.safetensors"):
        clip = load(name)
        again, arguments = clip.patcher.cached_patcher_init
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                clip.patcher.model.state_dict().values(), again(*arguments).model.state_dict().values()
            )
        )
        assert same, "a clone for another device must be the same encoder"
        for i, caption in enumerate(captions):
            out[f"{name} {i}"] = encode(clip, caption)
    save_file(out, paths["out"])
    names = [name for name in sorted(os.listdir(paths["files"])) if name != "other.safetensors"]
    result = {
        "complaints": [line for line in complaints.lines if "clip" in line],
        "weighted": not torch.equal(encode(clip, "a (red:1.5) circle"), encode(clip, "a red circle")),
        "sentences": {
            name: sentence(load, name).replace(paths["files"] + os.sep, "")
            for name in [*names, "nowhere.safetensors"]
        },
        "listed": apt.APTLoadTextEncoder.GET_NODE_INFO_V1()["input"]["required"]["text_encoder"][1][
            "options"
        ],
    }
print(json.dumps(result))
